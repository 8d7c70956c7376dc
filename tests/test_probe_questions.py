"""What a probe says of single questions: the columns of its result, and the curves that are drawn of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.probed import run_of
from sklearn.calibration import calibration_curve

from AutomaticEval import probe
from AutomaticEval.analysis.probes.folds import folds
from AutomaticEval.analysis.probes.linear import chosen_probe
from AutomaticEval.report.probes.by_question import reliability_figure, risk_coverage_figure
from AutomaticEval.report.probes.curves import kept_share, reliability

N, WIDTH = 120, 6


def draws(seed: int = 0) -> tuple[Any, Any]:
    """Rows whose first number tells the label about."""
    source = np.random.default_rng(seed)
    labels = source.integers(0, 2, N)
    rows = source.normal(size=(N, WIDTH))
    rows[:, 0] += 1.5 * labels
    return rows, labels


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows, labels = draws()
    columns = [{"correct": bool(each), "doc_id": 7 * number} for number, each in enumerate(labels)]
    return probe(run_of(tmp_path_factory.mktemp("asked") / "run", {"layer_0": rows}, columns), n_repeats=2)


def test_each_question_has_the_probability_of_the_probes_that_did_not_learn_from_it(result: Any) -> None:
    rows, labels = draws()
    found = result.measured["questions"]
    assert list(found) == ["task", "doc_id", "repeat", "label", "probability", "confidence"]
    assert found["doc_id"] == [7 * number for number in range(N)]
    assert (found["task"], found["repeat"], found["confidence"]) == (["t"] * N, [0] * N, [None] * N)
    assert found["label"] == labels.tolist()
    by_hand = np.zeros((2, N))
    for repeat, whole in enumerate(folds(labels, np.arange(N), 5, 2, 42)):
        for fold in whole:
            one, _ = chosen_probe(rows.astype(np.float32), labels, fold)
            by_hand[repeat, fold.test] = 1 / (1 + np.exp(-one.log_odds(rows[fold.test])))
    np.testing.assert_allclose(found["probability"], by_hand.mean(0), atol=1e-5)
    assert json.loads(json.dumps(result.as_json()))["questions"] == found


def test_bins_are_scikit_learns(result: Any) -> None:
    said, labels = (np.array(result.measured["questions"][name]) for name in ("probability", "label"))
    found = reliability(said, labels)
    true, mean = calibration_curve(labels, said, n_bins=10)
    held = found.n > 0
    np.testing.assert_allclose(found.true[held], true)
    np.testing.assert_allclose(found.said[held], mean)
    np.testing.assert_array_equal(found.n, np.histogram(said, 10, (0, 1))[0])
    assert np.isnan(reliability(np.array([1.0]), np.array([1])).said[:9]).all()


def test_what_is_kept_is_as_good_as_counted_by_hand() -> None:
    scores, right = np.array([0.9, 0.2, 0.5, 0.5]), np.array([1, 0, 1, 0])
    np.testing.assert_allclose(kept_share(scores, right), [1, 1.5 / 2, 2 / 3, 2 / 4])
    np.testing.assert_allclose(kept_share(right, right), [1, 1, 2 / 3, 2 / 4])
    np.testing.assert_allclose(kept_share(np.ones(4), right), np.full(4, 0.5))


@pytest.mark.parametrize(("target", "positive"), [("correct", "true"), ("correct", "false"), ("answer", "true")])
def test_the_figures_draw_these_numbers(
    result: Any, monkeypatch: pytest.MonkeyPatch, target: str, positive: str
) -> None:
    """For `correct` the model's accuracy by the probability that it is right; for another target the probe's by its sureness."""
    drawn: list[Any] = []
    monkeypatch.setattr("AutomaticEval.report.probes.by_question.save", lambda figure, *_: drawn.append(figure))
    told = json.loads(json.dumps(result.as_json()))
    told["classes"] |= {"target": target, "positive": positive}
    told["questions"]["confidence"] = [None, *np.linspace(0.3, 0.9, N - 1).tolist()]
    for one in (reliability_figure, risk_coverage_figure):
        one(told, Path("unused"))
    above, below, risk = (axes for figure in drawn for axes in figure.axes)
    said, labels = (np.array(told["questions"][name]) for name in ("probability", "label"))
    bins = reliability(said, labels)
    np.testing.assert_allclose(above.lines[1].get_ydata(), bins.true)
    assert [bar.get_height() for bar in below.patches[:10]] == bins.n.tolist()
    assert len(below.patches) == (20 if (target, positive) == ("correct", "true") else 10)
    sureness, right = {
        ("correct", "true"): (said, labels),
        ("correct", "false"): (1 - said, 1 - labels),
        ("answer", "true"): (np.abs(said - 0.5), (said > 0.5) == labels),
    }[target, positive]
    order = np.argsort(-sureness)
    by_hand = np.cumsum(right[order]) / np.arange(1, N + 1)
    np.testing.assert_allclose(risk.lines[0].get_ydata(), by_hand)
    np.testing.assert_allclose(risk.lines[2].get_ydata(), right.mean())
    assert len(risk.lines) == (4 if target == "correct" else 3)

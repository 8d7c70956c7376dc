"""Probes of several classes: each against the rest, averaged; against scikit-learn's on the same folds, planted truth, and by simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import within
from helpers.probed import run_of
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from AutomaticEval import open_run, probe
from AutomaticEval.analysis.probes.folds import folds
from AutomaticEval.analysis.probes.intervals import auroc_within_folds, estimate, mean_over_questions
from AutomaticEval.analysis.probes.judged import Judge
from AutomaticEval.analysis.probes.linear import chosen_probe
from AutomaticEval.analysis.probes.measures import calibration_error
from AutomaticEval.analysis.probes.out_of_fold import out_of_fold
from AutomaticEval.analysis.probes.places import along_means, shuffled_labels
from AutomaticEval.analysis.probes.saved.learned_on_all import learn_probe
from AutomaticEval.analysis.probes.several.one_vs_rest import normalised
from AutomaticEval.analysis.steering.of_probe import best_direction
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.pages.run_page import run_page
from AutomaticEval.report.probes.by_question import reliability_figure, risk_coverage_figure
from AutomaticEval.store.run import Run

N, WIDTH = 240, 10


def classes_of(n: int = N) -> Any:
    return np.random.default_rng(9).integers(0, 4, n)


def planted_rows(strength: float = 2.0, seed: int = 0, n: int = N) -> Any:
    """Each class lies further along a direction of its own."""
    rows = np.random.default_rng(seed).normal(size=(n, WIDTH))
    rows[np.arange(n), classes_of(n)] += strength
    return rows.astype(np.float32)


def answers(labels: Any) -> list[dict[str, Any]]:
    return [{"target": int(each), "choices": list("ABCD"), "doc_id": n} for n, each in enumerate(labels)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three layers of noise; in one of them each of four answers has a direction."""
    sites = {f"layer_{layer}": planted_rows(0, layer + 20) for layer in range(3)} | {"layer_1": planted_rows()}
    sites["embeddings"] = planted_rows(0, 30)
    return run_of(tmp_path_factory.mktemp("planted") / "run", sites, answers(classes_of()))


@pytest.fixture(scope="module")
def result(planted: Run) -> Any:
    return probe(planted, "answer")


def test_planted_directions_of_four_classes_are_found_at_their_layer_and_nowhere_else(result: Any) -> None:
    measured = result.measured
    assert list(measured["best"]["places"]) == ["layer_1"]
    for each in measured["places"]:
        is_there = each.site == "layer_1"
        for auroc in (each.probe.auroc, each.difference_of_means):
            assert (auroc.simultaneous[0] > 0.5) == is_there, each.site
        assert (each.p < 0.05) == is_there
    of_class = measured["best"]["by_class"]
    assert list(of_class) == list(measured["classes"]["counts"]) == ["0", "1", "2", "3"]
    assert all(each.interval[0] > 0.75 for each in of_class.values())
    assert measured["best"]["judged"].auroc.mean == pytest.approx(np.mean([each.mean for each in of_class.values()]))
    assert measured["findings"] == []
    assert measured["classes"] == {
        "target": "answer",
        **dict.fromkeys(("positive", "negative", "n_positive", "n_negative")),
        "n_left_out": 0,
        "n_groups": N,
        "counts": {str(each): int((classes_of() == each).sum()) for each in range(4)},
    }


def test_baselines_and_shuffled_classes_are_at_chance(result: Any) -> None:
    baselines = {each.name: each.judged for each in result.measured["baselines"] if each.judged}
    assert baselines["majority"].auroc.mean == pytest.approx(0.5, abs=1e-12)
    most = np.bincount(classes_of()).max() / N
    assert baselines["majority"].accuracy.mean == pytest.approx(most, abs=0.02)
    for name in ("embedding", "shuffled", "question_words"):
        low, high = baselines[name].auroc.interval
        assert low <= 0.5 <= high, name


def test_a_class_that_follows_the_length_of_the_answer_is_named_by_the_audit(tmp_path: Path) -> None:
    labels = classes_of()
    columns = [
        each | {"response": "word " * (1 + 2 * int(label))} for each, label in zip(answers(labels), labels, strict=True)
    ]
    run = run_of(tmp_path / "run", {"layer_0": planted_rows(0.8)}, columns)
    assert {"as_good_as_probe:answer_length", "follows:answer_length"} <= {
        each.name for each in probe(run, "answer").measured["findings"]
    }
    shuffled = np.random.default_rng(1).permutation(labels)
    at_chance = probe(run_of(tmp_path / "other", {"layer_0": planted_rows()}, answers(shuffled)), "answer").measured
    assert [each.name for each in at_chance["findings"]] == ["at_chance"]


def test_the_numbers_are_scikit_learns_on_the_same_folds() -> None:
    labels, rows = classes_of(), planted_rows(1.0)
    repeats = list(folds(labels, np.arange(N), 5, 2, 0))
    found = out_of_fold(lambda _: rows, labels, repeats, (0.1,))
    said = Judge(labels, np.arange(N), repeats)(found)
    of_theirs, aurocs, along = np.empty((2, N, 4)), [], []
    for repeat, whole in enumerate(repeats):
        for fold in whole:
            plain = OneVsRestClassifier(LogisticRegression(C=0.1, tol=1e-6, max_iter=1000))
            scaled = make_pipeline(StandardScaler(), plain).fit(rows[fold.train], labels[fold.train])
            of_theirs[repeat, fold.test] = scaled.predict_proba(rows[fold.test])
            for into, scores in ((aurocs, found.probabilities[:, repeat].T), (along, of_theirs[repeat])):
                into.append(roc_auc_score(labels[fold.test], scores[fold.test], multi_class="ovr", average="macro"))
    assert said.auroc.mean == pytest.approx(np.mean(aurocs), abs=1e-12)
    assert said.auroc.mean == pytest.approx(np.mean(along), abs=2e-3)  # their solver goes further
    ours = np.moveaxis(found.probabilities, 0, -1)
    np.testing.assert_allclose(ours, of_theirs, atol=3e-3)
    np.testing.assert_allclose(ours.sum(-1), 1)
    assert said.accuracy.mean == pytest.approx((ours.argmax(-1) == labels).mean())
    assert said.brier.mean == pytest.approx(np.mean([brier_score_loss(labels, each) for each in ours]))
    gap = 0.0
    for each in ours:
        sure, right = each.max(1), each.argmax(1) == labels
        inside = np.digitize(sure, np.arange(1, 10) / 10)
        gap += sum(abs((sure - right)[inside == number].sum()) for number in range(10)) / N / 2
    assert said.ece == pytest.approx(gap)


def test_probabilities_near_0_and_1_keep_their_order() -> None:
    odds = np.array([[60.0, 60, 3], [-50, -50, -50], [-40, -41, -1]])
    found = normalised(odds)
    assert found[0, 1] > found[0, 0] > found[0, 2]
    plain = 1 / (1 + np.exp(-odds))
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), plain / plain.sum(0), rtol=1e-12)
    np.testing.assert_allclose(logsumexp(-np.logaddexp(0, -found), axis=0), 0, atol=1e-12)


def test_two_classes_have_the_numbers_of_one_side_to_the_last_bit() -> None:
    """Each number by the definition that two classes have without any other."""
    labels, groups, rows = (classes_of() > 1).astype(int), np.arange(N) // 2, planted_rows(0.7)
    repeats, shuffles = list(folds(labels, groups, 5, 2, 0)), shuffled_labels(labels, groups, 0, 3)
    along, of_shuffles = along_means(rows, labels, repeats, shuffles)
    found, judge = out_of_fold(lambda _: rows, labels, repeats), Judge(labels, groups, repeats)
    odds = np.empty((2, N))
    for repeat, whole in enumerate(repeats):
        for number, fold in enumerate(whole):
            one, on = chosen_probe(rows, labels, fold)
            odds[repeat, fold.test] = one.log_odds(rows[fold.test])
            assert found.chosen_on[repeat, number] == on
    np.testing.assert_array_equal(found.log_odds, odds)
    assert (along.shape, of_shuffles.shape) == ((2, N), (3,))
    said, probabilities = judge(found), 1 / (1 + np.exp(-odds))
    right, squares = (probabilities > 0.5) == labels, (probabilities - labels) ** 2
    for measured, share in (
        (said.auroc, auroc_within_folds(odds, labels, repeats)),
        (said.accuracy, mean_over_questions(right.astype(float))),
        (said.brier, mean_over_questions(squares)),
    ):
        assert measured == estimate(share, groups, labels)
    assert said.ece == np.mean([calibration_error(each, labels) for each in probabilities])


def test_the_difference_of_means_is_that_of_each_class_against_the_rest() -> None:
    labels, groups, rows = classes_of(), np.arange(N), planted_rows(1.0)
    repeats, shuffles = list(folds(labels, groups, 5, 1, 0)), shuffled_labels(labels, groups, 0, 4)
    along, of_shuffles = along_means(rows, labels, repeats, shuffles)
    each = [along_means(rows, (labels == k) * 1, repeats, (shuffles == k) * 1) for k in range(4)]
    np.testing.assert_array_equal(along, [one for one, _ in each])
    np.testing.assert_allclose(of_shuffles, np.mean([one for _, one in each], axis=0))


@pytest.mark.parametrize(
    ("n", "n_classes", "signal", "in_group"), [(120, 4, 0.0, 2), (120, 3, 1.0, 1), (160, 6, 1.5, 1)]
)
def test_intervals_of_means_over_classes_hold_the_truth_in_90_to_100_of_100_runs(
    n: int, n_classes: int, signal: float, in_group: int
) -> None:
    draw, groups, width = np.random.default_rng(5), np.repeat(np.arange(n // in_group), in_group), 12
    found = []
    for _ in range(100):
        labels = draw.permutation(np.arange(n // in_group) % n_classes)[groups]
        rows = draw.normal(size=(n // in_group, width))[groups].astype(np.float32)
        rows[np.arange(n), labels] += signal
        repeats = list(folds(labels, groups, 5, 1, 0))
        along, _ = along_means(rows, labels, repeats, labels[None])
        share = Judge(labels, groups, repeats).auroc(along)
        found.append((share.value, *(estimate(share, groups, labels).interval or (0, 0))))
    values, low, high = np.array(found).T
    covered = ((low <= values.mean()) & (values.mean() <= high)).mean()
    assert covered >= 0.90 - 2 * (0.9 * 0.1 / 100) ** 0.5
    assert (high - low).mean() < 2 * 3.2 * values.std()  # and it is not merely wide


def test_what_has_too_many_or_too_rare_classes_is_refused_before_work(planted: Run, tmp_path: Path) -> None:
    labels = classes_of()
    labels[:3] = 7
    run = run_of(tmp_path / "run", {"layer_0": planted_rows()}, answers(labels))
    with pytest.raises(StoreError, match=r"fewer than 5 different questions, .* 7 \(3\)\. Use fewer folds.*--positive"):
        probe(run, "answer")
    assert probe(run, "answer", n_folds=3).measured["classes"]["counts"]["7"] == 3
    with pytest.raises(
        SelectionError, match=r"doc_id has 240 values, and a probe tells at most 20 classes apart. Name"
    ):
        probe(planted, "doc_id")
    with pytest.raises(SelectionError, match=r"transfer is of two classes, and answer has 4. Name .*--positive"):
        probe(planted, "answer", transfer=[planted])


def test_what_is_kept_is_of_two_classes(planted: Run, result: Any, tmp_path: Path) -> None:
    for make, what in ((learn_probe, "a saved probe"), (best_direction, "a direction")):
        with pytest.raises(SelectionError, match=f"{what} is of two classes, and answer has 4"):
            make(planted, result)
    for option in ("--save_probe", "--save_direction"):
        done = within("probe", str(planted.path), "--target", "answer", option, "x.safetensors", cwd=tmp_path)
        assert (done.returncode, f"{option} is of two classes" in done.stderr) == (2, True)
        assert [*tmp_path.iterdir()] == []


def test_the_command_prints_and_draws_all_classes_and_a_page_shows_them(
    planted: Run, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = within("probe", str(planted.path), "--target", "answer", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out" / "probe.json"
    written = json.loads(file.read_text())
    assert written == json.loads(json.dumps(result.as_json()))
    text = " ".join(done.stdout.split())
    for told in ("Classes: answer: 4 classes: 0 (", "Mean AUROC of 4 classes 0.", "By class, at the best place"):
        assert told in text
    assert {each.name for each in file.parent.glob("*.png")} == {
        "probe.png",
        "probe_reliability.png",
        "probe_risk_coverage.png",
    }
    questions = written["questions"]
    assert questions["label"] == classes_of().tolist()
    said = np.array(questions["probability"])
    assert said.shape == (N, 4)
    drawn: list[Any] = []
    monkeypatch.setattr("AutomaticEval.report.probes.by_question.save", lambda figure, *_: drawn.append(figure))
    for one in (reliability_figure, risk_coverage_figure):
        one(written, Path("unused"))
    above, below, risk = (axes for figure in drawn for axes in figure.axes)
    right = said.argmax(1) == classes_of()
    assert sum(bar.get_height() for bar in below.patches) == N
    assert above.get_ylabel() == "share that is right"
    by_hand = np.cumsum(right[np.argsort(-said.max(1), kind="stable")]) / np.arange(1, N + 1)
    np.testing.assert_allclose(risk.lines[0].get_ydata(), by_hand)
    page = run_page(open_run(planted.path), results=[file])
    assert "the mean of 4 classes, each against the rest" in page
    assert "answer: 4 classes: 0 (" in page
    assert f"{written['best']['by_class']['3']['mean']:.3f} [" in page

"""Probes of one run on another: what is the same in both is found in both, and no probe judges a question that it has learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import within
from helpers.probed import run_of
from sklearn.metrics import roc_auc_score

from AutomaticEval import open_run, probe
from AutomaticEval.analysis.probes.across.shared_questions import NOBODY, judges_of
from AutomaticEval.analysis.probes.folds import folds
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.pages.probe_result import probe_section

N, WIDTH = 120, 6


def made(folder: Path, seed: int, column: int, sign: float = 1.0, **more: Any) -> Any:
    """A run whose label is along one column of layer_1; layer_0 is noise. Its documents are its own."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, N)
    rows = draw.normal(size=(2, N, more.pop("width", WIDTH)))
    rows[1, :, column] += 3 * sign * labels
    columns = [{"correct": bool(each), "doc_id": 1000 * seed + number} for number, each in enumerate(labels)]
    prompts = more.pop("prompts", [f"question {seed} {number}" for number in range(N)])
    return run_of(folder, {"layer_0": rows[0], "layer_1": rows[1]}, columns, prompts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The second is as the first; in the third right answers lie the other way."""
    folder = tmp_path_factory.mktemp("runs")
    return [made(folder / name, seed, 2, sign) for name, seed, sign in (("a", 1, 1), ("b", 2, 1), ("c", 3, -1))]


def test_the_matrix_says_which_runs_share_a_direction(runs: list[Any]) -> None:
    result = probe(runs[0], transfer=runs[1:])
    told = result.measured["transfer"]
    assert [each["path"] for each in told["runs"]] == ["a", "b", "c"]
    assert all(list(each["places"]) == ["layer_1"] for each in told["runs"])
    cells = {(each.train, each.test): each for each in told["cells"]}
    assert list(cells) == [(one, two) for one in range(3) for two in range(3)]
    for (train, test), each in cells.items():
        low, high = each.auroc.interval
        if train == test:
            assert each.below_own is None
            assert low > 0.9
        elif 2 in (train, test):
            assert high < 0.2
            assert each.below_own.interval[0] > 0.7
        else:
            assert low > 0.9
            assert each.below_own.interval[0] < 0 < each.below_own.interval[1]
        assert (each.n_shared, each.n_left_out) == (0, 0)
    best = result.measured["best"]["judged"].auroc
    assert (cells[0, 0].auroc.mean, cells[0, 0].auroc.interval) == (best.mean, best.interval)
    own = probe(runs[1]).measured["best"]["judged"].auroc
    assert (cells[1, 1].auroc.mean, cells[1, 1].auroc.interval) == (own.mean, own.interval)


def test_equal_questions_are_judged_by_a_probe_that_has_not_learned_from_them(tmp_path: Path) -> None:
    """Two runs over the same prompts, with more columns than questions: a probe that has learned from a question knows its label by heart."""
    draw = np.random.default_rng(0)
    labels, rows = draw.integers(0, 2, 60), draw.normal(size=(60, 200))
    prompts = [f"prompt {number}" for number in range(60)]
    columns = [{"correct": bool(each), "doc_id": number} for number, each in enumerate(labels)]
    one, same = (run_of(tmp_path / name, {"layer_0": rows}, columns, prompts) for name in "ab")
    by_document = run_of(tmp_path / "c", {"layer_0": rows}, columns, [f"{each}, please" for each in prompts])
    cells = {
        (each.train, each.test): each for each in probe(one, transfer=[same, by_document]).measured["transfer"]["cells"]
    }
    for each in cells.values():
        assert each.n_shared == (0 if each.train == each.test else 60)
        assert each.auroc.mean == pytest.approx(cells[0, 0].auroc.mean)  # the very probes of the diagonal
    others = [{**each, "doc_id": each["doc_id"] + 100} for each in columns]
    unknown = run_of(tmp_path / "d", {"layer_0": rows}, others, [f"{each}, please" for each in prompts])
    seen = probe(one, transfer=[unknown]).measured["transfer"]["cells"][1]
    assert seen.n_shared == 0
    assert seen.auroc.mean > 0.9  # what would be told, were they not known again


def test_a_cell_is_what_the_probes_of_the_folds_give_by_hand(runs: list[Any], tmp_path: Path) -> None:
    """Against scikit-learn's own AUROC of the questions that each fold's probe judges."""
    from AutomaticEval.analysis.probes.across.shared_questions import names_of
    from AutomaticEval.analysis.probes.asked import Asked, judge_of, rows_of
    from AutomaticEval.analysis.probes.linear import chosen_probe
    from AutomaticEval.analysis.probes.target import target_of

    asked = Asked("correct", "prompt[-1]", "question", 5, 1, 42)
    one, other = (target_of(run.questions()) for run in runs[:2])
    judge = judge_of(one, asked)
    names = [names_of(each.questions, "question") for each in (one, other)]
    judges = judges_of(names[0], judge.repeats, names[1], other.labels, other.questions.groups, 42)
    aurocs = []
    for number, fold in enumerate(judge.repeats[0]):
        learned, _ = chosen_probe(rows_of(one.questions, "layer_1", "prompt[-1]"), one.labels, fold)
        there = judges.of_repeats[0] == number
        said = learned.log_odds(rows_of(other.questions, "layer_1", "prompt[-1]")[there])
        aurocs.append(roc_auc_score(other.labels[there], said))
    cell = probe(runs[0], transfer=[runs[1]]).measured["transfer"]["cells"][1]
    assert cell.auroc.mean == pytest.approx(np.mean(aurocs))


def test_no_probe_judges_what_it_has_learned_from() -> None:
    """Names that two folds learn from leave no probe but those of the other folds; names of all folds leave none."""
    draw = np.random.default_rng(1)
    labels, units = draw.integers(0, 2, 100), np.arange(100) // 2
    learned = [frozenset([("words", number // 4), "all" if number < 40 else number]) for number in range(100)]
    asked = [frozenset([("words", 10 + number // 4)]) for number in range(98)] + [frozenset(["all"])] * 2
    repeats = list(folds(labels, units, 5, 2, 0))
    judges = judges_of(learned, repeats, asked, labels, units, 0)
    for fold_of, whole in zip(judges.of_repeats, repeats, strict=True):
        for number, fold in enumerate(whole):
            known = frozenset().union(*(learned[each] for each in fold.train))
            assert all(known.isdisjoint(asked[each]) for each in np.flatnonzero(fold_of == number))
        assert (fold_of[98:] == NOBODY).all()
        alone = np.flatnonzero([each.isdisjoint(frozenset().union(*learned)) for each in asked])
        for label in (0, 1):  # about as many of each label for each probe
            assert np.bincount(fold_of[(labels == label) & (fold_of != NOBODY)], minlength=5).min() >= 4
        assert (fold_of[alone] != NOBODY).all()
    assert judges.n_shared == 100 - len(alone)


def test_what_cannot_be_compared_is_refused_before_anything_is_learned(runs: list[Any], tmp_path: Path) -> None:
    def never(_: int) -> None:
        raise AssertionError("a place was probed")

    wider = made(tmp_path / "wider", 4, 2, width=9)
    with pytest.raises(SelectionError, match=r"layer_0 has 6 numbers in .*a and 9 in .*wider: a probe of one"):
        probe(runs[0], transfer=[wider], advance=never)
    fewer = run_of(tmp_path / "fewer", {"layer_0": np.ones((N, WIDTH))}, [{"correct": n % 2 == 0} for n in range(N)])
    with pytest.raises(StoreError, match="layer_1"):
        probe(runs[0], transfer=[fewer], advance=never)
    few = runs[1].where(np.arange(N) < 9)
    with pytest.raises(StoreError, match=r"b: \d different questions have the label"):
        probe(runs[0], transfer=[few], advance=never)


def test_the_command_prints_writes_and_draws_the_matrix(runs: list[Any], tmp_path: Path) -> None:
    paths = ",".join(str(run.path) for run in runs[1:])
    done = within("probe", str(runs[0].path), "--sites", "layer_1", "--transfer", paths, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    expected = probe(open_run(runs[0].path), keys=["layer_1"], transfer=[open_run(each.path) for each in runs[1:]])
    assert written["transfer"] == json.loads(json.dumps(expected.as_json()["transfer"]))
    assert (tmp_path / "out" / "probe_transfer.png").stat().st_size > 20_000
    assert "1: a (layer_1)" in done.stdout
    ((_, columns, rows),) = probe_section(written)["matrices"]
    assert columns == ["Learned from", "on 1: a", "on 2: b", "on 3: c"]
    cells = {(each["train"], each["test"]): each["auroc"]["mean"] for each in written["transfer"]["cells"]}
    shown = {(train, test): float(rows[train][1 + test].split()[0]) for train, test in cells}
    assert shown == pytest.approx(cells, abs=5e-4)
    wrong = within("probe", str(runs[0].path), "--transfer", "nowhere", "-o", "again", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "StoreError: no file or run folder" in wrong.stderr
    assert not (tmp_path / "again").exists()

"""Two runs over the same questions, held against lm-eval's own verdicts, full enumeration, and other formulas of the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.samples import SETTINGS, make_sample

from AutomaticEval import Edit, editing, evaluate_with_activations, open_run
from AutomaticEval.analysis.compare_runs import compare_runs
from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.numbers.similarity import cosines, linear_cka
from AutomaticEval.errors import StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.store.writer import RunWriter

VECTOR = torch.randn(128, generator=torch.Generator().manual_seed(3)) * 1.5


@pytest.fixture(scope="module")
def runs(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo benchmark by the plain model and by one that is edited at layer 1; the second asks more questions."""
    folder = tmp_path_factory.mktemp("pair")
    evaluate_with_activations(demo, "demo", limit=12, output=folder / "plain")
    with editing(demo, Edit.add("layer_1", VECTOR)) as edited:
        evaluate_with_activations(edited, "demo", limit=15, output=folder / "edited")
    return folder / "plain", folder / "edited"


def verdicts(run: Path) -> dict[tuple[str, int], float]:
    """(task, document) -> lm-eval's own metric, from its samples files."""
    found = {}
    for file in run.glob("*/samples_*.jsonl"):
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            found[task, entry["doc_id"]] = float(entry.get("acc", entry.get("exact_match")))
    return found


def test_scores_and_flips_are_lm_evals(runs: tuple[Path, Path]) -> None:
    measured = compare_runs(*map(open_run, runs)).measured
    before, after = map(verdicts, runs)
    assert (measured["n_questions"], measured["n_only_before"], measured["n_only_after"]) == (24, 0, 6)
    assert [each.task for each in measured["tasks"]] == ["demo_arithmetic", "demo_facts", "all"]
    for each in measured["tasks"]:
        keys = [key for key in before if each.task in (key[0], "all")]
        one, other = np.array([before[key] for key in keys]), np.array([after[key] for key in keys])
        assert each.n == len(keys)
        assert (each.before, each.after) == pytest.approx((one.mean(), other.mean()))
        assert each.difference.mean == pytest.approx((other - one).mean())
        low, high = each.difference.interval
        assert low <= each.difference.mean <= high
        gained, lost = int((other > one).sum()), int((other < one).sum())
        assert (each.n_gained, each.n_lost) == (gained, lost)
        n = gained + lost
        tail = sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, gained)) / 2**n  # the two-sided exact test
        assert each.p == pytest.approx(tail)
    flipped = {key for key in before if before[key] != after[key]}
    assert flipped, "the edit flips nothing"
    assert {(each["task"], each["doc_id"]) for each in measured["flips"]} == flipped
    for each in measured["flips"]:
        assert (each["now"] == "right") == bool(after[each["task"], each["doc_id"]])


def test_likeness_is_that_of_the_same_questions_rows(runs: tuple[Path, Path]) -> None:
    result = compare_runs(*map(open_run, runs))
    sites = {each.site: each for each in result.measured["sites"]}
    one, other = (open_run(run).questions() for run in runs)
    order = [list(zip(each.column("task"), each.column("doc_id"), strict=True)) for each in (one, other)]
    pairs = [order[1].index(key) for key in order[0]]
    for key in ("layer_0", "layer_1", "layer_3"):
        left, right = one.activations(key).double(), other.activations(key).double()[pairs]
        assert sites[key].cosine.mean == pytest.approx(float(torch.cosine_similarity(left, right).mean()))
        assert sites[key].n == 24
    assert sites["layer_0"].cosine.mean == pytest.approx(1)  # below the edit
    assert sites["layer_1"].cka == pytest.approx(1)  # one vector is added to every row: a shift
    assert sites["layer_1"].cosine.mean < 0.95
    assert sites["embeddings"].cka is None  # every question ends with the same token


def test_the_command_writes_prints_and_draws(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = within("compare", *map(str, runs), "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["kind"] == "runs"
    assert written["after"]["edits"] == open_run(runs[1]).settings["edits"]
    assert (tmp_path / "out" / "runs_comparison.png").stat().st_size > 10_000
    assert f"Flipped: {len(written['flips'])}" in done.stdout
    assert f"6 questions that only {runs[1]} has" in " ".join(done.stdout.split())
    again = within("compare", *map(str, runs), "-o", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert (
        "out/compare.json exists and is not overwritten; choose another name, or another folder (-o/--output)."
        in again.stderr
    )


def test_runs_that_share_nothing_are_refused(runs: tuple[Path, Path]) -> None:
    one, other = map(open_run, runs)
    with pytest.raises(StoreError, match="share no question"):
        compare_runs(one.where(task="demo_facts"), other.where(task="demo_arithmetic"))


def test_other_prompts_are_counted_and_their_rows_left_out(
    runs: tuple[Path, Path], demo: LoadedModel, tmp_path: Path
) -> None:
    evaluate_with_activations(demo, "demo_facts", limit=4, num_fewshot=1, output=tmp_path / "shot")
    measured = compare_runs(open_run(runs[0]), open_run(tmp_path / "shot")).measured
    assert (measured["n_questions"], measured["n_other_prompts"], measured["sites"]) == (4, 4, [])
    assert measured["tasks"][0].n == 4


def hsic_by_definition(one: np.ndarray, other: np.ndarray) -> float:
    """The U-statistic over all quadruples of rows."""
    n = len(one)
    k, m = one @ one.T, other @ other.T
    total, count = 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q]
                        count += 1
    return total / count


def test_cka_is_that_of_its_definition() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(7, 3)) + 5, draw.normal(size=(7, 5)) - 2
    parts = [hsic_by_definition(*pair) for pair in ((one, other), (one, one), (other, other))]
    assert linear_cka(one, other) == pytest.approx(parts[0] / (parts[1] * parts[2]) ** 0.5)


@pytest.mark.parametrize(
    "change",
    [lambda x: x * 3, lambda x: x + 7, lambda x: x @ np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0]],
)
def test_cka_does_not_see_scales_shifts_and_rotations(change: Callable[[np.ndarray], np.ndarray]) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 9))
    assert linear_cka(rows, change(rows)) == pytest.approx(1)


def test_cka_of_unrelated_rows_is_about_zero_also_for_few() -> None:
    """Where the plain estimate is far above it."""
    draw = np.random.default_rng(0)
    found = [linear_cka(draw.normal(size=(20, 100)), draw.normal(size=(20, 100))) for _ in range(200)]
    assert abs(np.mean(found)) < 0.02


def test_rows_that_are_zero_or_all_the_same() -> None:
    rows = np.zeros((4, 3))
    assert cosines(rows, rows + 1).tolist() == [0, 0, 0, 0]
    assert linear_cka(rows, np.eye(4)) is None


def made_run(folder: Path, correct: list[bool | None], predictions: list[int | None], repeats: int = 1) -> Path:
    with RunWriter(folder, "m", SETTINGS) as made:
        for number, (right, said) in enumerate(zip(correct, predictions, strict=True)):
            doc, repeat = divmod(number, repeats)
            about = {"task": "t", "doc_id": doc, "repeat": repeat, "correct": right, "prediction": said, "target": 0}
            made.add([make_sample(seed=number, **about)])
        made.finish()
    return folder


def test_a_run_agrees_with_itself_also_without_predictions(tmp_path: Path) -> None:
    run = open_run(made_run(tmp_path / "a", [True, False, None, None], [0, 1, None, None]))
    measured = compare_runs(run, run).measured
    assert measured["agreement"] == 1
    assert (measured["tasks"][0].n, measured["flips"]) == (2, [])


def test_answers_to_one_document_are_one_unit(tmp_path: Path) -> None:
    """The interval is that of six documents, and no test of independent flips is made."""
    before = made_run(tmp_path / "a", [False] * 12, [1] * 12, repeats=2)
    after = made_run(tmp_path / "b", [True] * 6 + [False] * 6, [0] * 6 + [1] * 6, repeats=2)
    (change,) = compare_runs(*map(open_run, (before, after))).measured["tasks"]
    assert (change.n, change.difference.n, change.difference.mean, change.n_gained) == (12, 6, 0.5, 6)
    assert change.difference == mean_interval([1.0, 1, 1, 0, 0, 0])
    assert change.p is None
    (line,) = open_run(after).tasks()
    assert (line.n_questions, line.correct) == (12, 0.5)

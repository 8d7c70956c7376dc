"""Two runs over the same questions: what became of the score, which questions flipped, and how alike the activations are.

For base against fine-tuned, plain against edited, 16 against 8 bits. Questions are paired by task, document and repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.numbers.similarity import cosines, linear_cka
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.errors import StoreError
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.reader import Run

MOST_ROWS = 2000
"""The most questions over which activations are compared; of more, so many are drawn."""
TOLD = ("model_hash", "dtype", "quantization", "edits", "adapters", "loaded_with", "positions")
"""What the result says of the settings of each run."""


@dataclass(frozen=True)
class TaskChange:
    """What became of a task's score, over the questions that have a verdict in both runs."""

    task: str
    n: int
    before: float
    after: float
    """The shares that were answered rightly."""

    difference: Estimate
    """after - before, with the paired interval: questions are drawn, each with both of its verdicts."""

    n_gained: int
    """Wrong before, right after."""

    n_lost: int
    p: float
    """McNemar's exact test: how often chance alone would divide the flipped questions as unevenly."""


@dataclass(frozen=True)
class SiteLikeness:
    """How alike the rows of a site are at the questions' last tokens."""

    site: str
    n: int
    cosine: Estimate | None
    """Mean cosine of the two rows of a question. None for sites of other widths."""

    cka: float | None
    """Linear CKA, debiased: 1 for rows that differ by a rotation and a scale, about 0 for unrelated ones. None for fewer than four questions."""


def compare_runs(before: Run, after: Run, *, seed: int = 42) -> Result:
    """Compare two runs over the questions that both have. seed: draws resamples, and the questions whose activations are compared.

    The result's `measured` has `tasks` (`TaskChange`; the last one is all of them), `agreement`, `flips` and `sites` (`SiteLikeness`, of the sites
    that both runs have). Activations are compared where the prompts are the same text, a site at a time.
    Raises StoreError for runs that share no question, and for runs without questions.
    """
    one, other, alone = _paired(before, after)
    left, right = one.table(), other.table()
    same = [
        first == second and list(choices) == list(others)
        for first, second, choices, others in zip(
            left["question"], right["question"], left["choices"], right["choices"], strict=True
        )
    ]
    measured = {
        "before": {"path": before.path.name, "model": before.model, **_told(before)},
        "after": {"path": after.path.name, "model": after.model, **_told(after)},
        "n_questions": len(one),
        "n_only_before": alone[0],
        "n_only_after": alone[1],
        "n_other_prompts": same.count(False),
        "tasks": _tasks(left, right, seed),
        "agreement": _agreement(left, right),
        "flips": _flips(left, right),
        "sites": _sites(before, after, one.where(same), other.where(same), seed),
    }
    return Result("runs", measured, {"seed": seed, "most_rows": MOST_ROWS})


def _told(run: Run) -> dict[str, Any]:
    return {name: run.settings.get(name) for name in TOLD if run.settings.get(name) is not None}


def _paired(before: Run, after: Run) -> tuple[Questions, Questions, tuple[int, int]]:
    """The questions that both runs have, in one order, and how many each has alone."""
    one, other = before.questions(), after.questions()
    there, place = _numbers(one), _numbers(other)
    shared = [key for key in there if key in place]
    if not shared:
        raise StoreError(f"{before.path} and {after.path} share no question: no task and document is in both.")
    return (
        one.take([there[key] for key in shared]),
        other.take([place[key] for key in shared]),
        (len(one) - len(shared), len(other) - len(shared)),
    )


def _numbers(questions: Questions) -> dict[tuple[Any, ...], int]:
    """(task, document, repeat) -> the question's number."""
    names = map(questions.column, ("task", "doc_id", "repeat"))
    return {key: number for number, key in enumerate(zip(*names, strict=True))}


def _tasks(left: Any, right: Any, seed: int) -> list[TaskChange]:
    """Each task by name, and then all of them when there are several."""
    known = left["correct"].notna() & right["correct"].notna()
    task = left["task"].fillna("")
    changes = [
        _change(name, left["correct"][known & (task == name)], right["correct"][known & (task == name)], seed)
        for name in sorted(set(task[known]))
    ]
    if len(changes) > 1:
        changes.append(_change("all", left["correct"][known], right["correct"][known], seed))
    return changes


def _change(task: str, before: Sequence[Any], after: Sequence[Any], seed: int) -> TaskChange:
    one, other = np.array(before, np.int64), np.array(after, np.int64)
    gained, lost = int(((one == 0) & (other == 1)).sum()), int(((one == 1) & (other == 0)).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    difference = mean_interval((other - one).tolist(), seed)
    return TaskChange(task, len(one), float(one.mean()), float(other.mean()), difference, gained, lost, p)


def _agreement(left: Any, right: Any) -> float | None:
    """The share of questions with the same prediction, of those that have one in both runs."""
    pairs = [
        (one, other)
        for one, other in zip(left["prediction"], right["prediction"], strict=True)
        if one is not None and other is not None
    ]
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else None


def _flips(left: Any, right: Any) -> list[dict[str, Any]]:
    """The questions whose verdict changed, in the order of the first run."""
    flips = []
    for one, other in zip(left.to_dict("records"), right.to_dict("records"), strict=True):
        if one["correct"] is not None and other["correct"] is not None and one["correct"] != other["correct"]:
            about = {name: one[name] for name in ("task", "doc_id", "repeat", "question", "target")}
            now = "right" if other["correct"] else "wrong"
            flips.append({**about, "before": one["prediction"], "after": other["prediction"], "now": now})
    return flips


def _sites(before: Run, after: Run, one: Questions, other: Questions, seed: int) -> list[SiteLikeness]:
    if len(one) > MOST_ROWS:
        drawn = np.sort(np.random.default_rng(seed).choice(len(one), MOST_ROWS, replace=False)).tolist()
        one, other = one.take(drawn), other.take(drawn)
    shared = [key for key in before.keys if key in after.keys] if len(one) else []
    return [_likeness(key, _rows(one, key), _rows(other, key), seed) for key in shared]


def _rows(questions: Questions, key: str) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = questions.activations(key).double().numpy()
    return rows


def _likeness(site: str, one: NDArray[np.float64], other: NDArray[np.float64], seed: int) -> SiteLikeness:
    cosine = mean_interval(cosines(one, other).tolist(), seed) if one.shape == other.shape else None
    return SiteLikeness(site, len(one), cosine, linear_cka(one, other) if len(one) >= 4 else None)

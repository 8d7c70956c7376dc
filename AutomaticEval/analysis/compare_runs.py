"""Two runs over the same questions: what became of the score, which questions flipped, and how alike the activations are.

For base against fine-tuned, plain against edited, 16 against 8 bits. Questions are paired by task, document and repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from AutomaticEval.analysis.numbers import paired
from AutomaticEval.analysis.numbers.estimate import mean_interval, methods
from AutomaticEval.analysis.numbers.paired import PairedChange, corrected, paired_change
from AutomaticEval.analysis.numbers.similarity import cosines, linear_cka
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.errors import StoreError, warn
from AutomaticEval.sites import holds_ids
from AutomaticEval.store.questions.question import Question
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.reader import as_run
from AutomaticEval.store.run import Run

MOST_ROWS = 2000
"""The most questions over which activations are compared; of more, so many are drawn."""
Pair = tuple[Question, Question]
"""A question in the first run and in the second."""
TOLD = (
    "model_hash",
    "dtype",
    "quantization",
    "edits",
    "adapters",
    "loaded_with",
    "positions",
    "store_dtype",
    "reduce",
    "project",
)
"""What the result says of the settings of each run."""


@dataclass(frozen=True)
class TaskChange(PairedChange):
    """What became of a task's score, over the questions that have a verdict in both runs."""

    task: str = ""


@dataclass(frozen=True)
class SiteLikeness:
    """How alike the rows of a site are at the questions' last tokens."""

    site: str
    n: int
    cosine: Estimate | None
    """Mean cosine of the two rows of a question. None for sites of other widths, and for rows of one number, such as norms."""

    cka: float | None
    """Linear CKA, debiased: 1 for rows that differ by a rotation and a scale, about 0 for unrelated ones. None for fewer than four questions, and for rows that are all the same."""


def compare_runs(before: Run | str | Path, after: Run | str | Path, *, seed: int = 42) -> Result:
    """Compare two runs, or the runs at two paths, over the questions that both have. seed: draws the questions whose activations are compared.

    The result's `measured` has `tasks` (`TaskChange`; the last one is all of them), `agreement`, `flips` and `sites` (`SiteLikeness`, of the sites
    that both runs have). Activations are compared where the prompts are the same text, a site at a time.
    Raises StoreError for runs that share no question, and for runs without questions.
    """
    before, after = as_run(before), as_run(after)
    one, other, alone = shared_questions(before, after)
    pairs = list(zip(one, other, strict=True))
    same = same_prompts(pairs)
    measured: dict[str, Any] = {
        "before": {"path": before.path.name, "model": before.model, **_told(before)},
        "after": {"path": after.path.name, "model": after.model, **_told(after)},
        "n_questions": len(one),
        "n_only_before": alone[0],
        "n_only_after": alone[1],
        "n_other_prompts": same.count(False),
        "tasks": task_changes(pairs),
        "agreement": _agreement(pairs),
        "flips": _flips(pairs),
        "sites": _sites(before, after, one.where(same), other.where(same), seed),
    }
    settings = {
        "seed": seed,
        "most_rows": MOST_ROWS,
        "before": before.settings,
        "after": after.settings,
    }
    return Result("runs", measured, settings, methods(len(measured["tasks"]), p=paired.METHOD, is_together=False))


def _told(run: Run) -> dict[str, Any]:
    return {name: run.settings.get(name) for name in TOLD if run.settings.get(name) is not None}


def shared_questions(before: Run, after: Run) -> tuple[Questions, Questions, tuple[int, int]]:
    """The questions that both runs have, in one order, and how many each has alone. Raises StoreError when they share none."""
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


def same_prompts(pairs: Iterable[Pair]) -> list[bool]:
    """Whether the two questions of each pair were asked in the same words, so that their activations may be compared."""
    return [first.question == second.question and first.choices == second.choices for first, second in pairs]


def _numbers(questions: Questions) -> dict[tuple[Any, ...], int]:
    """(task, document, repeat) -> the question's number; where there are no documents, the question's own text is in their place."""
    names = map(questions.column, ("task", "doc_id", "repeat", "question"))
    return {
        (task, text if doc is None else doc, repeat): number
        for number, (task, doc, repeat, text) in enumerate(zip(*names, strict=True))
    }


def task_changes(pairs: Sequence[Pair]) -> list[TaskChange]:
    """Each task by name, and then all of them when there are several."""
    by_task: dict[str, list[_Verdicts]] = {}
    for before, after in pairs:
        if before.correct is not None and after.correct is not None:
            document = (before.task, before.question if before.doc_id is None else before.doc_id)
            by_task.setdefault(before.task or "", []).append(
                _Verdicts(int(before.correct), int(after.correct), document)
            )
    changes = [_change(name, verdicts) for name, verdicts in sorted(by_task.items())]
    every = [each for verdicts in by_task.values() for each in verdicts]
    return corrected([*changes, _change("all", every)] if len(changes) > 1 else changes)


class _Verdicts(NamedTuple):
    """The two verdicts on a question, 0 or 1, and the document that it is about."""

    before: int
    after: int
    document: Any


def _change(task: str, verdicts: Sequence[_Verdicts]) -> TaskChange:
    return TaskChange(**vars(paired_change(*zip(*verdicts, strict=True))), task=task)


def _agreement(pairs: Sequence[Pair]) -> float | None:
    """The share of questions with the same prediction, of those that have one in both runs."""
    said = [(before.prediction, after.prediction) for before, after in pairs]
    known = [both for both in said if None not in both]
    return sum(first == second for first, second in known) / len(known) if known else None


def _flips(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The questions whose verdict changed, in the order of the first run."""
    flips = []
    for before, after in pairs:
        if before.correct is not None and after.correct is not None and before.correct != after.correct:
            about = {name: getattr(before, name) for name in ("task", "doc_id", "repeat", "question", "target")}
            now = "right" if after.correct else "wrong"
            flips.append({**about, "before": before.prediction, "after": after.prediction, "now": now})
    return flips


def _sites(before: Run, after: Run, one: Questions, other: Questions, seed: int) -> list[SiteLikeness]:
    """Of the sites that both runs keep in the same way. A run that kept no row at the questions' last tokens has none."""
    if len(one) > MOST_ROWS:
        drawn = np.sort(np.random.default_rng(seed).choice(len(one), MOST_ROWS, replace=False)).tolist()
        one, other = one.take(drawn), other.take(drawn)
    ways = [[run.settings.get(name) for name in ("reduce", "project")] for run in (before, after)]
    if not len(one) or ways[0] != ways[1] or before.contents.is_by_sample:
        return []
    found = []
    for key in (key for key in before.keys if key in after.keys and not holds_ids(key)):
        try:
            found.append(_likeness(key, _rows(one, key), _rows(other, key)))
        except StoreError as absent:
            warn(f"{key} is not compared: {absent}")
            break
    return found


def _rows(questions: Questions, key: str) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = questions.activations(key).double().numpy()
    return rows


def _likeness(site: str, one: NDArray[np.float64], other: NDArray[np.float64]) -> SiteLikeness:
    has_directions = one.shape == other.shape and one.shape[1] > 1  # a norm has none
    cosine = mean_interval(cosines(one, other).tolist()) if has_directions else None
    return SiteLikeness(site, len(one), cosine, linear_cka(one, other) if len(one) >= 4 else None)

"""Two runs over the same questions: what became of the score, which questions flipped, and how alike the activations are.

For base against fine-tuned, plain against edited, 16 against 8 bits. Questions are paired by task, document and repeat.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.numbers.similarity import cosines, linear_cka
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.errors import StoreError
from AutomaticEval.store.questions.question import Question
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.reader import Run

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
class TaskChange:
    """What became of a task's score, over the questions that have a verdict in both runs."""

    task: str
    n: int
    before: float
    after: float
    """The shares that were answered rightly."""

    difference: Estimate
    """after - before, with the paired interval: documents are drawn, each with its verdicts in both runs."""

    n_gained: int
    """Wrong before, right after."""

    n_lost: int
    p: float | None
    """McNemar's exact test: how often chance alone would divide the flipped questions as unevenly. None where documents were answered several times."""


@dataclass(frozen=True)
class SiteLikeness:
    """How alike the rows of a site are at the questions' last tokens."""

    site: str
    n: int
    cosine: Estimate | None
    """Mean cosine of the two rows of a question. None for sites of other widths, and for rows of one number, such as norms."""

    cka: float | None
    """Linear CKA, debiased: 1 for rows that differ by a rotation and a scale, about 0 for unrelated ones. None for fewer than four questions, and for rows that are all the same."""


def compare_runs(before: Run, after: Run, *, seed: int = 42) -> Result:
    """Compare two runs over the questions that both have. seed: draws resamples, and the questions whose activations are compared.

    The result's `measured` has `tasks` (`TaskChange`; the last one is all of them), `agreement`, `flips` and `sites` (`SiteLikeness`, of the sites
    that both runs have). Activations are compared where the prompts are the same text, a site at a time.
    Raises StoreError for runs that share no question, and for runs without questions.
    """
    one, other, alone = shared_questions(before, after)
    pairs = list(zip(one, other, strict=True))
    same = same_prompts(pairs)
    measured = {
        "before": {"path": before.path.name, "model": before.model, **_told(before)},
        "after": {"path": after.path.name, "model": after.model, **_told(after)},
        "n_questions": len(one),
        "n_only_before": alone[0],
        "n_only_after": alone[1],
        "n_other_prompts": same.count(False),
        "tasks": _tasks(pairs, seed),
        "agreement": _agreement(pairs),
        "flips": _flips(pairs),
        "sites": _sites(before, after, one.where(same), other.where(same), seed),
    }
    return Result("runs", measured, {"seed": seed, "most_rows": MOST_ROWS})


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


def _tasks(pairs: Sequence[Pair], seed: int) -> list[TaskChange]:
    """Each task by name, and then all of them when there are several."""
    by_task: dict[str, list[_Verdicts]] = {}
    for before, after in pairs:
        if before.correct is not None and after.correct is not None:
            document = (before.task, before.question if before.doc_id is None else before.doc_id)
            by_task.setdefault(before.task or "", []).append(
                _Verdicts(document, int(before.correct), int(after.correct))
            )
    changes = [_change(name, verdicts, seed) for name, verdicts in sorted(by_task.items())]
    every = [each for verdicts in by_task.values() for each in verdicts]
    return [*changes, _change("all", every, seed)] if len(changes) > 1 else changes


class _Verdicts(NamedTuple):
    """The two verdicts on a question, 0 or 1, and the document that it is about."""

    document: Any
    before: int
    after: int


def _change(task: str, verdicts: Sequence[_Verdicts], seed: int) -> TaskChange:
    one, other = np.array([each.before for each in verdicts]), np.array([each.after for each in verdicts])
    gained, lost = int((other > one).sum()), int((other < one).sum())
    # a document that was answered several times is one unit: its answers are not independent
    of_document: dict[Any, list[int]] = {}
    for each in verdicts:
        of_document.setdefault(each.document, []).append(each.after - each.before)
    difference = mean_interval([sum(changes) / len(changes) for changes in of_document.values()], seed)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    is_one_each = len(of_document) == len(verdicts)
    return TaskChange(
        task,
        len(verdicts),
        float(one.mean()),
        float(other.mean()),
        difference,
        gained,
        lost,
        p if is_one_each else None,
    )


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
    for key in (key for key in before.keys if key in after.keys):
        try:
            found.append(_likeness(key, _rows(one, key), _rows(other, key), seed))
        except StoreError as absent:
            warnings.warn(f"{key} is not compared: {absent}", UserWarning, stacklevel=3)
            break
    return found


def _rows(questions: Questions, key: str) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = questions.activations(key).double().numpy()
    return rows


def _likeness(site: str, one: NDArray[np.float64], other: NDArray[np.float64], seed: int) -> SiteLikeness:
    has_directions = one.shape == other.shape and one.shape[1] > 1  # a norm has none
    cosine = mean_interval(cosines(one, other).tolist(), seed) if has_directions else None
    return SiteLikeness(site, len(one), cosine, linear_cka(one, other) if len(one) >= 4 else None)

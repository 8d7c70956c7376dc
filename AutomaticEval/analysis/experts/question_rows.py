"""Which rows of a run are which question's, and how often each expert of a layer was chosen in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.errors import StoreError
from AutomaticEval.selection import Positions
from AutomaticEval.store.ragged import indices_of
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
_SLAB_NUMBERS = 2**24
"""So many ids are in memory together."""


@dataclass(frozen=True)
class QuestionRows:
    """The rows of each question, or of each text of a run without questions: each row once, also when several choices share it."""

    tasks: list[str]
    """The task of each question; "" for texts."""

    correct: list[bool | None]
    n_again: int
    """Questions that are left out because an equal prompt came before: they are no further draw from the task."""

    rows: Array
    """[n_pairs]: numbers of rows, ascending."""

    owners: Array
    """[n_pairs]: the question that has the row."""

    read: Callable[[str, Array], Any]
    """Gives rows of a site by their numbers, as an array that is sliced."""

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def n_rows(self) -> Array:
        """[n_questions]"""
        return np.bincount(self.owners, minlength=len(self))

    def loads(self, key: str, n_experts: int) -> Array:
        """[n_questions, n_experts]: the share of a question's tokens that have each expert. Raises StoreError for an id that is no expert's."""
        distinct = np.unique(self.rows)
        array = self.read(key, distinct)
        step = max(1, _SLAB_NUMBERS // max(1, array.shape[1]))
        counts = np.zeros(len(self) * n_experts)
        for start in range(0, len(distinct), step):
            numbers = distinct[start : start + step]
            ids = array[start : start + step].numpy().astype(np.int64)  # [n, n_active]
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_experts:
                raise StoreError(
                    f"{key} holds the ids {ids.min()} to {ids.max()}, of {n_experts} experts; the file is not what it says."
                )
            low, high = np.searchsorted(self.rows, [numbers[0], numbers[-1] + 1])
            own = ids[np.searchsorted(numbers, self.rows[low:high])]
            counts += np.bincount((self.owners[low:high, None] * n_experts + own).ravel(), minlength=len(counts))
        loads: Array = counts.reshape(len(self), n_experts) / self.n_rows[:, None]
        return loads


def question_rows(run: Run, positions: str = "all") -> QuestionRows:
    """The rows of a run by question. positions: which tokens count, as for a capture.

    Raises UnknownPositions; StoreError for a run that kept none of these positions.
    """
    wanted = Positions.parse(positions)
    if run.contents.is_by_sample:
        raise StoreError(
            f"{run.path} holds lines of samples and no rows; the load of experts needs expert_ids of each token."
        )
    has_questions = "task" in run.contents.columns.names
    units, tasks, correct, n_again = _of_questions(run) if has_questions else _of_texts(run)
    contents = run.source.contents if has_questions else run.contents
    rows: list[Array] = []
    owners: list[Array] = []
    kept: list[int] = []
    for number, samples in enumerate(units):
        own = np.unique(np.concatenate([_rows_of(contents, sample, wanted) for sample in samples]))
        if len(own):
            rows.append(own)
            owners.append(np.full(len(own), len(kept)))
            kept.append(number)
    if not kept:
        raise StoreError(
            f"{run.path} kept no row at positions={positions}; it kept {run.settings.get('positions', 'all')}."
        )
    flat, of = np.concatenate(rows), np.concatenate(owners)
    order = np.argsort(flat, kind="stable")
    own_tasks, own_correct = [tasks[number] for number in kept], [correct[number] for number in kept]
    return QuestionRows(own_tasks, own_correct, n_again, flat[order], of[order], run.source.rows)


def _of_questions(run: Run) -> tuple[list[Array], list[str], list[bool | None], int]:
    questions = run.questions()
    _, first = np.unique(questions.groups, return_index=True)
    once = questions.take(np.sort(first).tolist())
    names = once.column("task")
    correct = [None if each is None else bool(each) for each in once.column("correct")]
    units = [once.samples.item(number) for number in range(len(once))]
    return units, names, correct, len(questions) - len(once)


def _of_texts(run: Run) -> tuple[list[Array], list[str], list[bool | None], int]:
    n = run.contents.n_samples
    return [np.array([number]) for number in range(n)], [""] * n, [None] * n, 0


def _rows_of(contents: Any, sample: int, wanted: Positions) -> Array:
    """The numbers of the rows of a sample at the wanted positions."""
    rows = indices_of(contents.segments.item(sample))
    if str(wanted) == "all" or not len(rows):
        return rows
    places = wanted.resolve(len(contents.input_ids.item(sample)), len(contents.generated_ids.item(sample)))
    kept: Array = rows[np.isin(contents.positions[rows], np.asarray(places))]
    return kept

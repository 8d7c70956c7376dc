"""Which questions of a run may be judged by which probes of another: by those that have not learned from the same question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.store.questions.questions import Questions

Array = np.ndarray[Any, Any]
NOBODY = -1
Names = Sequence[frozenset[Any]]
"""Of each question, all by which it is known again in another run."""


class Judges(NamedTuple):
    """Of the questions that are judged."""

    of_repeats: list[Array]
    """[n_questions] for each repeat: the number of the fold whose probe judges the question; NOBODY where all have learned from it."""

    n_shared: int
    """Questions that are in the run that was learned from."""


def names_of(questions: Questions, split: str) -> list[frozenset[Any]]:
    """The words of each question, its task and document; with split='task' also its task alone."""
    columns = map(questions.column, ("question", "task", "doc_id"))
    return [
        frozenset(
            [
                ("words", text),
                *([("document", task, doc)] if doc is not None else []),
                *([("task", str(task))] if split == "task" else []),
            ]
        )
        for text, task, doc in zip(*columns, strict=True)
    ]


def judges_of(
    learned: Names, repeats: Sequence[Sequence[Fold]], asked: Names, labels: Array, units: Array, seed: int
) -> Judges:
    """For each question of the run that is judged a fold of the other run, whose probe has not learned from it.

    learned: of the run with these folds. asked, labels, units: of the run that is judged; a unit is judged by one probe. What is in one run alone is dealt out,
    so that each probe judges about as many questions of each label.
    """
    members = _members(units)
    of_units = [frozenset().union(*(asked[number] for number in each)) for each in members]
    order = _dealt(members, labels, seed)
    made = []
    for whole in repeats:
        known = [frozenset().union(*(learned[number] for number in fold.train)) for fold in whole]
        fold_of = np.full(len(asked), NOBODY)
        n_judged = np.zeros((2, len(whole)), int)  # of each label apart
        for unit in order:
            free = [number for number, each in enumerate(known) if each.isdisjoint(of_units[unit])]
            if free:
                of_label = n_judged[int(labels[members[unit]].mean() > 0.5)]
                least = free[int(of_label[free].argmin())]
                of_label[least] += 1
                fold_of[members[unit]] = least
        made.append(fold_of)
    every = frozenset().union(*learned)
    return Judges(made, sum(not every.isdisjoint(each) for each in asked))


def _members(units: Array) -> list[Array]:
    """The questions of each unit."""
    _, number = np.unique(units, return_inverse=True)
    order = np.argsort(number, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(number[order])) + 1)


def _dealt(members: Sequence[Array], labels: Array, seed: int) -> Array:
    """The units in the order in which they are dealt out: by their share of the label, and drawn among equal ones."""
    share = np.array([labels[each].mean() for each in members])
    order: Array = np.lexsort([np.random.default_rng([seed, 2]).random(len(members)), share])
    return order

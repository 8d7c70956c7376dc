"""Which questions a probe learns from, is chosen on, and is judged on: three parts that share no group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from AutomaticEval.errors import StoreError

Array = np.ndarray[Any, Any]
LEAST_FOLDS = 3
"""One to learn from, one to choose on, and one to judge on."""


class Fold(NamedTuple):
    """Numbers of questions."""

    fit: Array
    """Probes of each strength learn from these …"""

    choose: Array
    """… and the strength, and the best place, are chosen on these."""

    test: Array
    """Judged on these, by a probe that learned from `fit` and `choose`."""

    @property
    def train(self) -> Array:
        """`fit` and `choose`."""
        train: Array = np.sort(np.concatenate([self.fit, self.choose]))
        return train


def folds(
    labels: Array, groups: Array, n_folds: int, n_repeats: int, seed: int, unit: str = "different questions"
) -> Iterator[list[Fold]]:
    """For each repeat, n_folds folds: each question is tested once a repeat, and a group is in one part of a fold only.

    labels, groups: [n_questions]; the parts have about the same share of each label. The part that is chosen on is the fold after the tested one.
    unit: what a group is, for messages. Raises StoreError when a label has fewer groups than there are folds, and for labels that no probe can
    learn from in some fold.
    """
    for label in np.unique(labels):
        n = len(np.unique(groups[labels == label]))
        if n < n_folds:
            raise StoreError(
                f"{n} {unit} have the label {label}; {n_folds} folds need at least {n_folds} of each. Ask more questions, or use fewer folds "
                f"(at least {LEAST_FOLDS})."
            )
    for repeat in range(n_repeats):
        state = int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=state)
        parts = [test for _, test in splitter.split(np.zeros(len(labels)), labels, groups)]
        made = [_fold(parts, number) for number in range(n_folds)]
        n_labels = len(np.unique(labels))
        if any(len(np.unique(labels[fold.fit])) < n_labels for fold in made):
            what = "have one label" if n_labels == 2 else "lack one of the classes"
            raise StoreError(
                f"with {n_folds} folds there is one where all {unit} to learn from {what}. Ask more questions, or use another --seed."
            )
        yield made


def _fold(parts: list[Array], number: int) -> Fold:
    after = (number + 1) % len(parts)
    rest = [part for place, part in enumerate(parts) if place not in (number, after)]
    return Fold(np.sort(np.concatenate(rest)), parts[after], parts[number])

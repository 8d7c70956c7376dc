"""What a probe says of each question when it has not learned from it, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.linear import chosen_probe
from AutomaticEval.analysis.probes.measures import MEASURES

Array = np.ndarray[Any, Any]
WITHIN_FOLDS = ("auroc", "prr")
"""Measures that rank questions. Probes of different folds rank on scales of their own, so that these are means over the folds."""
N_RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class OutOfFold:
    """Of one place, or one baseline."""

    log_odds: Array
    """[n_repeats, n_questions]: of each question, by the probe that did not learn from it."""

    chosen_on: Array
    """[n_repeats, n_folds]: the AUROC where the strength was chosen, which is not where it is judged."""

    @property
    def probabilities(self) -> Array:
        """[n_repeats, n_questions]."""
        probabilities: Array = 1 / (1 + np.exp(-np.clip(self.log_odds, -500, 500)))
        return probabilities


def out_of_fold(rows: Callable[[Fold], Array], labels: Array, repeats: Sequence[Sequence[Fold]]) -> OutOfFold:
    """rows: gives [n_questions, width] for a fold: the activations, or features that are learned from the fold's training part."""
    log_odds, chosen_on = np.empty((len(repeats), len(labels))), np.empty((len(repeats), len(repeats[0])))
    for repeat, whole in enumerate(repeats):
        for number, fold in enumerate(whole):
            table = rows(fold)
            probe, chosen_on[repeat, number] = chosen_probe(table, labels, fold)
            log_odds[repeat, fold.test] = probe.log_odds(table[fold.test])
    return OutOfFold(log_odds, chosen_on)


def best_of(places: Sequence[OutOfFold], repeats: Sequence[Sequence[Fold]]) -> tuple[OutOfFold, Array]:
    """What the place says that was best where strengths were chosen, fold by fold, and that place's number [n_repeats, n_folds].

    No question that it is judged on has had a part in choosing the place.
    """
    chosen_on = np.stack([each.chosen_on for each in places])
    best = chosen_on.argmax(0)
    log_odds = np.empty_like(places[0].log_odds)
    for repeat, whole in enumerate(repeats):
        for number, fold in enumerate(whole):
            log_odds[repeat, fold.test] = places[best[repeat, number]].log_odds[repeat, fold.test]
    return OutOfFold(log_odds, chosen_on.max(0)), best


def resamples(groups: Array, seed: int, n: int = N_RESAMPLES) -> Array:
    """[1 + n, n_questions]: how often each question is in each resample. Groups are drawn, with all their questions; the first line is all questions once."""
    _, numbers = np.unique(groups, return_inverse=True)
    n_groups = int(numbers.max()) + 1
    counts = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n)
    return np.vstack([np.ones((1, len(groups))), counts[:, numbers]])


def measured(found: OutOfFold, labels: Array, repeats: Sequence[Sequence[Fold]], weights: Array) -> dict[str, Array]:
    """Measure -> its value in each resample [1 + n]; the first is that of the questions themselves. Means over the repeats."""
    values: dict[str, Array] = {}
    for name, measure in MEASURES.items():
        parts = [
            measure(said[part], labels[part], weights[:, part])
            for said, whole in zip(found.probabilities, repeats, strict=True)
            for part in ([fold.test for fold in whole] if name in WITHIN_FOLDS else [np.arange(len(labels))])
        ]
        values[name] = np.mean(parts, axis=0)
    return values

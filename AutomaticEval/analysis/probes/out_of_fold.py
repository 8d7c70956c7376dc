"""What a probe says of each question when it has not learned from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.linear import STRENGTHS, Linear, chosen_probe
from AutomaticEval.analysis.probes.several.one_vs_rest import OneVsRest
from AutomaticEval.analysis.probes.several.sides import sides_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutOfFold:
    """Of one place, or one baseline."""

    log_odds: Array
    """[n_repeats, n_questions]: of each question, by the probe that did not learn from it. Of several classes [n_classes, n_repeats, n_questions]."""

    chosen_on: Array
    """[n_repeats, n_folds]: the AUROC where the strength was chosen, which is not where it is judged. 0 where that part has one label only.
    Of several classes the mean."""

    probes: Sequence[Sequence[Linear | OneVsRest]] = ()
    """[n_repeats][n_folds]: the probe of each fold, or those of several classes."""

    @property
    def probabilities(self) -> Array:
        """In the shape of the log-odds."""
        probabilities: Array = 1 / (1 + np.exp(-np.clip(self.log_odds, -500, 500)))
        return probabilities


def out_of_fold(
    rows: Callable[[Fold], Any],
    labels: Array,
    repeats: Sequence[Sequence[Fold]],
    strengths: Sequence[float] = STRENGTHS,
) -> OutOfFold:
    """rows: gives [n_questions, width] for a fold: the activations, or features that are learned from the fold's training part; sparse ones, too.

    labels: [n_questions], 0 or 1, or the numbers of several classes, each of which is told from the rest.
    """
    sides = sides_of(labels)
    shape = (len(repeats), len(labels)) if len(sides) == 1 else (len(sides), len(repeats), len(labels))
    log_odds, chosen_on = np.empty(shape), np.empty((len(repeats), len(repeats[0])))
    probes: list[list[Linear | OneVsRest]] = []
    for repeat, whole in enumerate(repeats):
        probes.append([])
        for number, fold in enumerate(whole):
            table = rows(fold)
            made, on = zip(*(chosen_probe(table, side, fold, strengths) for side in sides), strict=True)
            probe, chosen_on[repeat, number] = made[0] if len(made) == 1 else OneVsRest.of(made), np.mean(on)
            log_odds[..., repeat, fold.test] = probe.log_odds(table[fold.test])
            probes[-1].append(probe)
    return OutOfFold(log_odds, chosen_on, probes)


def best_of(places: Sequence[OutOfFold], repeats: Sequence[Sequence[Fold]]) -> tuple[OutOfFold, Array]:
    """What the place says that was best where strengths were chosen, fold by fold, and that place's number [n_repeats, n_folds].

    No question that it is judged on has had a part in choosing the place.
    """
    chosen_on = np.stack([each.chosen_on for each in places])
    best = chosen_on.argmax(0)
    log_odds = np.empty_like(places[0].log_odds)
    for repeat, whole in enumerate(repeats):
        for number, fold in enumerate(whole):
            log_odds[..., repeat, fold.test] = places[best[repeat, number]].log_odds[..., repeat, fold.test]
    probes = [
        [places[place].probes[repeat][number] for number, place in enumerate(of_repeat)]
        for repeat, of_repeat in enumerate(best.tolist())
    ]
    return OutOfFold(log_odds, chosen_on.max(0), probes), best

"""How sure the numbers of a probe are, and by how much two probes differ on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from AutomaticEval.analysis.numbers.skewed_t import LEAST, LEVEL, of_family
from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.measures import placements
from AutomaticEval.analysis.result import Estimate

Array = np.ndarray[Any, Any]
WIDER = 1.3
"""Questions that are judged are also learned from, which a standard error with fixed probes does not see. Chosen by simulation (decision 0026)."""
METHOD = (
    f"DeLong's standard error over groups of equal prompts (over tasks with split='task'), {WIDER} times as wide because each question is also learned "
    "from; Student's t, of AUROC and accuracy on the logit scale (docs/probes.md)"
)


@dataclass(frozen=True)
class Share:
    """A number of a probe, and how much each question moves it."""

    value: float
    influence: Array
    """[n_questions]: by how much the number would rise if the question counted twice."""

    is_difference: bool = False

    def __sub__(self, other: Share) -> Share:
        """The difference of two numbers of the same questions, paired."""
        return Share(self.value - other.value, self.influence - other.influence, True)


def auroc_within_folds(scores: Array, labels: Array, repeats: Sequence[Sequence[Fold]]) -> Share:
    """The mean of the AUROCs of all folds: probes of different folds rank on scales of their own. Folds with one label only are left out.

    scores: [n_repeats, n_questions], out of fold. labels: [n_questions], 0 or 1.
    """
    placed, weights = np.zeros(scores.shape), np.zeros(scores.shape)
    for repeat, whole in enumerate(repeats):
        for fold in whole:
            there = labels[fold.test].astype(bool)
            if there.any() and not there.all():
                placed[repeat, fold.test] = placements(scores[repeat, fold.test], labels[fold.test])
                weights[repeat, fold.test] = np.where(there, 1 / there.sum(), 1 / (~there).sum())
    weights /= weights.sum() / 2  # the questions of each label together have the weight 1
    value = min(1.0, float((weights * placed).sum() / 2)) if weights.any() else float("nan")
    return Share(value, (weights * (placed - value)).sum(0))


def mean_of(shares: Sequence[Share]) -> Share:
    """The mean of numbers of the same questions, such as the AUROCs of all classes: a question moves it by the mean of how it moves each."""
    return Share(float(np.mean([each.value for each in shares])), np.mean([each.influence for each in shares], axis=0))


def mean_over_questions(values: Array) -> Share:
    """values: [n_repeats, n_questions]."""
    of_questions = values.mean(0)
    return Share(float(of_questions.mean()), (of_questions - of_questions.mean()) / len(of_questions))


def estimate(share: Share, units: Array, labels: Array, n_comparisons: int = 1) -> Estimate:
    """The number with its 95 % interval, and the one at the level of all numbers that are compared.

    units: [n_questions]: questions with the same number are drawn together: equal prompts, or tasks. labels: 0 or 1, or the numbers of classes. No interval for fewer than LEAST units.
    """
    n, n_units = len(units), len(np.unique(units))
    if n_units < LEAST:
        return Estimate(
            share.value, None, n, reason=f"{n_units} separate groups or tasks: an interval needs {LEAST} at least."
        )
    least = min(len(np.unique(units[labels == label])) for label in np.unique(labels))
    alone, together = (interval(share, units, least, level) for level in (LEVEL, of_family(n_comparisons)))
    return Estimate(share.value, alone, n, together if n_comparisons > 1 else None)


def interval(share: Share, units: Array, least: int, level: float = LEVEL) -> tuple[float, float]:
    """Low and high; the number is between them. least: how many units have the rarer label."""
    sums = np.bincount(np.unique(units, return_inverse=True)[1], share.influence)
    error = WIDER * float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)))
    reach = float(stats.t.ppf((1 + level) / 2, len(sums) - 1))
    if share.is_difference:
        return share.value - reach * error, share.value + reach * error
    if not 1e-9 < share.value < 1 - 1e-9:  # no question moves it: what `least` groups without one exception say
        unseen = ((1 - level) / 2) ** (1 / least)
        return (unseen, 1.0) if share.value > 0.5 else (0.0, 1 - unseen)
    spread = reach * error / (share.value * (1 - share.value))
    middle = np.log(share.value / (1 - share.value))
    low, high = 1 / (1 + np.exp(-np.clip([middle - spread, middle + spread], -500, 500)))
    return min(float(low), share.value), max(
        float(high), share.value
    )  # rounding must not put the interval beside its number

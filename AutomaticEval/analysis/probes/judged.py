"""How good a probe or a baseline is, in the numbers that are written and printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.intervals import Share, auroc_within_folds, estimate, mean_of, mean_over_questions
from AutomaticEval.analysis.probes.measures import calibration_error, rejection_ratio
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold
from AutomaticEval.analysis.probes.several.sides import of_sides, outcomes, sides_of
from AutomaticEval.analysis.result import Estimate

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Judged:
    """Of one probe, or one baseline, over the questions that it has not learned from."""

    auroc: Estimate
    """The share of pairs (a question of the class, one of the other) that are ranked rightly; 0.5 is chance. The mean over folds, and over several classes."""

    accuracy: Estimate
    brier: Estimate
    """The mean square of probability - label; 0 is best. Of several classes the sum over them."""

    ece: float
    """Expected calibration error, of several classes that of the likeliest one. It has no interval: chance can only make it larger."""

    prr: float | None
    """Prediction rejection ratio: 1 ranks as the labels themselves, 0 as chance. The mean over folds; None where a fold has one label only."""

    below_best: Estimate | None = None
    """AUROC of the best probe minus this one, on the same questions."""


@dataclass(frozen=True)
class JudgedPlace:
    """A place, with both kinds of probe."""

    site: str
    position: str
    probe: Judged
    """Of the logistic probe."""

    difference_of_means: Estimate
    """AUROC along the difference of the classes' means."""

    p: float | None
    """How often shuffled labels give the difference of means as high an AUROC at any place. None with split='task'."""


@dataclass(frozen=True)
class JudgedBaseline:
    """A baseline, or why there is none."""

    name: str
    told: str
    judged: Judged | None
    reason: str | None = None
    n_known: int | None = None
    """Of a column of numbers: the questions that have one. The others have the mean of these, and a second column says that they have none."""


@dataclass(frozen=True)
class Judge:
    """The questions over which probes are judged."""

    labels: Array
    """[n_questions], 0 or 1, or the numbers of several classes."""

    units: Array
    """[n_questions]: questions with the same number are in one fold, and are drawn together: equal prompts, or tasks."""

    repeats: Sequence[Sequence[Fold]]

    def auroc(self, log_odds: Array) -> Share:
        """log_odds: [n_repeats, n_questions], out of fold; of several classes [n_classes, n_repeats, n_questions], and the mean over them."""
        return mean_of([auroc_within_folds(*each, self.repeats) for each in self._sides(log_odds)])

    def by_class(self, log_odds: Array) -> list[Estimate]:
        """The AUROC of each of several classes against the rest. Together they are as many comparisons."""
        each = [(auroc_within_folds(said, side, self.repeats), side) for said, side in self._sides(log_odds)]
        return [estimate(share, self.units, side, len(each)) for share, side in each]

    def _sides(self, log_odds: Array) -> list[tuple[Array, Array]]:
        """What was said, [n_repeats, n_questions], and the labels, 0 or 1: of each class, or of class 1 alone."""
        sides = sides_of(self.labels)
        return list(zip(of_sides(log_odds, len(sides)), sides, strict=True))

    def estimate(self, share: Share, n_comparisons: int = 1) -> Estimate:
        """The number with its interval."""
        return estimate(share, self.units, self.labels, n_comparisons)

    def __call__(self, found: OutOfFold, n_comparisons: int = 1, best: Share | None = None) -> Judged:
        """n_comparisons: how many are compared. best: the AUROC of the best probe."""
        of, auroc = outcomes(found.probabilities, self.labels), self.auroc(found.log_odds)
        ratios = [
            rejection_ratio(of_repeat[fold.test], side[fold.test])
            for said, side in self._sides(found.log_odds)
            for of_repeat, whole in zip(said, self.repeats, strict=True)
            for fold in whole
        ]
        ratio = float(np.mean(ratios))
        return Judged(
            self.estimate(auroc, n_comparisons),
            self.estimate(mean_over_questions(of.right.astype(float)), n_comparisons),
            self.estimate(mean_over_questions(of.squares), n_comparisons),
            float(np.mean([calibration_error(*each) for each in zip(of.said, of.true, strict=True)])),
            None if np.isnan(ratio) else ratio,
            None if best is None else self.estimate(best - auroc, n_comparisons),
        )

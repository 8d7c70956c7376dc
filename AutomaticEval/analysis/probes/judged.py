"""How good a probe or a baseline is, in the numbers that are written and printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.intervals import Share, auroc_within_folds, estimate, mean_over_questions
from AutomaticEval.analysis.probes.measures import calibration_error, rejection_ratio
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold
from AutomaticEval.analysis.result import Estimate

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Judged:
    """Of one probe, or one baseline, over the questions that it has not learned from."""

    auroc: Estimate
    """The share of pairs (a question of the class, one of the other) that are ranked rightly; 0.5 is chance. The mean over folds."""

    accuracy: Estimate
    brier: Estimate
    """The mean square of probability - label; 0 is best."""

    ece: float
    """Expected calibration error. It has no interval: chance can only make it larger."""

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


@dataclass(frozen=True)
class Judge:
    """The questions over which probes are judged."""

    labels: Array
    units: Array
    """[n_questions]: questions with the same number are in one fold, and are drawn together: equal prompts, or tasks."""

    repeats: Sequence[Sequence[Fold]]

    def auroc(self, log_odds: Array) -> Share:
        """log_odds: [n_repeats, n_questions], out of fold."""
        return auroc_within_folds(log_odds, self.labels, self.repeats)

    def estimate(self, share: Share, n_comparisons: int = 1) -> Estimate:
        """The number with its interval."""
        return estimate(share, self.units, self.labels, n_comparisons)

    def __call__(self, found: OutOfFold, n_comparisons: int = 1, best: Share | None = None) -> Judged:
        """n_comparisons: how many are compared. best: the AUROC of the best probe."""
        said, auroc = found.probabilities, self.auroc(found.log_odds)
        right = (said > 0.5) == self.labels.astype(bool)
        ratios = [
            rejection_ratio(of_repeat[fold.test], self.labels[fold.test])
            for of_repeat, whole in zip(found.log_odds, self.repeats, strict=True)
            for fold in whole
        ]
        ratio = float(np.mean(ratios))
        return Judged(
            self.estimate(auroc, n_comparisons),
            self.estimate(mean_over_questions(right.astype(float)), n_comparisons),
            self.estimate(mean_over_questions((said - self.labels) ** 2), n_comparisons),
            float(np.mean([calibration_error(each, self.labels) for each in said])),
            None if np.isnan(ratio) else ratio,
            None if best is None else self.estimate(best - auroc, n_comparisons),
        )

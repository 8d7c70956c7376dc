"""How good a score is at telling questions with a label from those without it."""

from __future__ import annotations

from typing import Any

import numpy as np

from AutomaticEval.report.probes.curves import N_BINS, kept_share

Array = np.ndarray[Any, Any]


def placements(scores: Array, labels: Array) -> Array:
    """[n]: of a question with the label, the share of those without it that have a lower score; of one without it, the share of those with it
    that have a higher one. Equal scores count half. NaN where there are no others.

    scores, labels: [n]; labels are 0 or 1. The mean over either label is the AUROC. Source: DeLong, DeLong and Clarke-Pearson 1988.
    """
    is_true = labels.astype(bool)
    ordered = {side: np.sort(scores[is_true == side]) for side in (True, False)}
    below = {
        side: (np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right"))
        / (2 * max(1, len(others)))
        for side, others in ordered.items()
    }
    found: Array = np.where(is_true, below[False], 1 - below[True])
    return found if len(ordered[True]) and len(ordered[False]) else np.full(len(scores), np.nan)


def auroc(scores: Array, labels: Array) -> float:
    """The share of pairs (a question with the label, one without) in which the first has the higher score; ties count half. NaN with one label only."""
    placed = placements(scores, labels)[labels.astype(bool)]
    return float(placed.mean()) if len(placed) else float("nan")


def calibration_error(probabilities: Array, labels: Array) -> float:
    """The expected calibration error: by how much the mean probability of a bin differs from the share of its questions with the label."""
    bins = np.minimum((probabilities * N_BINS).astype(int), N_BINS - 1)
    return float(np.abs(np.bincount(bins, probabilities - labels, N_BINS)).sum() / len(labels))


def rejection_ratio(scores: Array, labels: Array) -> float:
    """The prediction rejection ratio: by how much leaving out the questions with the lowest scores raises the share with the label.

    1 is what the labels themselves would give, and 0 what leaving out questions at random gives. NaN with one label only.
    """
    base = float(labels.mean())
    most = _area(labels, labels) - base
    return (_area(scores, labels) - base) / most if most > 0 else float("nan")


def _area(scores: Array, labels: Array) -> float:
    """The share of labels among the k questions with the highest scores, averaged over k. Questions with equal scores stand in any order: the mean of all."""
    return float(kept_share(scores, labels).mean())

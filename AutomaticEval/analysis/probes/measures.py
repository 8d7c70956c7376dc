"""How good a score is at telling right from wrong, and by how much that could be chance: every measure takes weights, so that one call gives all resamples.

Weights are [n_resamples, n]: how often each question is in each resample. A measure gives [n_resamples]; NaN where it is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
N_BINS = 10
"""The expected calibration error is taken over so many bins of equal width."""


def auroc(scores: Array, labels: Array, weights: Array) -> Array:
    """The share of pairs (a question with the label, one without) in which the first has the higher score; ties count half. All [n]."""
    order = np.argsort(scores, kind="stable")
    ranked, is_true = scores[order], labels[order].astype(bool)
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))  # of equal scores
    of_true, of_false = (
        np.add.reduceat(np.where(mask, weights[:, order], 0.0), starts, axis=1) for mask in (is_true, ~is_true)
    )
    below = np.cumsum(of_false, axis=1) - of_false / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Array = (of_true * below).sum(1) / (of_true.sum(1) * of_false.sum(1))
    return share


def accuracy(probabilities: Array, labels: Array, weights: Array) -> Array:
    """The share of questions on whose side of 1/2 the probability is."""
    return _mean(((probabilities > 0.5) == labels.astype(bool)).astype(float), weights)


def brier(probabilities: Array, labels: Array, weights: Array) -> Array:
    """The mean square of probability - label: 0 is best, 0.25 is a probability of 1/2 for all."""
    return _mean((probabilities - labels) ** 2, weights)


def calibration_error(probabilities: Array, labels: Array, weights: Array) -> Array:
    """The expected calibration error: by how much the mean probability of a bin differs from the share of its questions with the label."""
    bins = np.minimum((probabilities * N_BINS).astype(int), N_BINS - 1)
    inside = np.eye(N_BINS)[bins]  # [n, N_BINS]
    gap = np.abs((weights * (probabilities - labels)) @ inside).sum(1)
    return _ratio(gap, weights.sum(1))


def rejection_ratio(probabilities: Array, labels: Array, weights: Array) -> Array:
    """The prediction rejection ratio: by how much leaving out the questions with the lowest probability raises the share with the label.

    1 is what the labels themselves would give, and 0 what leaving out questions at random gives.
    """
    shares = [_area(each, labels, weights) for each in (probabilities, labels.astype(float))]
    base = _ratio(weights @ labels.astype(float), weights.sum(1))
    return _ratio(shares[0] - base, shares[1] - base)


def _area(scores: Array, labels: Array, weights: Array) -> Array:
    """The share of labels among the questions with the highest scores, averaged over how many are kept. Questions with equal scores are kept together."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.append(True, scores[order][1:] != scores[order][:-1]))
    kept = np.add.reduceat(weights[:, order], starts, axis=1)
    right = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    n_kept, n_right = np.cumsum(kept, axis=1), np.cumsum(right, axis=1)
    share = _ratio(n_right, n_kept)
    return _ratio((kept * np.nan_to_num(share)).sum(1), kept.sum(1))


def _mean(values: Array, weights: Array) -> Array:
    return _ratio(weights @ values, weights.sum(1))


def _ratio(above: Array, below: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Array = above / below
    return ratio


MEASURES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "auroc": auroc,
    "accuracy": accuracy,
    "brier": brier,
    "ece": calibration_error,
    "prr": rejection_ratio,
}
"""Name in results -> the measure."""

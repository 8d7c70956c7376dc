"""The numbers of curves over questions: how often a probability comes true, and how good the answers are that are kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
N_BINS = 10
"""Of equal width; the expected calibration error has the same."""


class Bins(NamedTuple):
    """Questions by their probability, in bins of equal width: [N_BINS] each."""

    said: Array
    """The mean probability of a bin; NaN for an empty one."""

    true: Array
    """The share of a bin's questions that have the label; NaN for an empty one."""

    n: Array
    """How many questions it has."""


def reliability(probabilities: Array, labels: Array) -> Bins:
    """probabilities, labels: [n]; labels are 0 or 1. A probability on the edge of two bins is in the upper one, as for the expected calibration error."""
    bins = np.minimum((probabilities * N_BINS).astype(int), N_BINS - 1)
    n = np.bincount(bins, minlength=N_BINS)
    with np.errstate(invalid="ignore"):
        return Bins(np.bincount(bins, probabilities, N_BINS) / n, np.bincount(bins, labels, N_BINS) / n, n)


def kept_share(scores: Array, right: Array) -> Array:
    """[n]: the share that is right among the k questions with the highest scores, for each k from 1 to n.

    scores, right: [n]; right is 0 or 1. Questions with equal scores stand in any order: the mean of all.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))
    n_kept = np.arange(1, len(scores) + 1)
    n_right = np.interp(n_kept, [0, *(ends + 1)], [0, *np.cumsum(right[order])[ends]])
    share: Array = n_right / n_kept
    return share

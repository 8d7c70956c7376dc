"""How far two groups differ, in many columns at once, and how often chance alone would do as much in any of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class Differences(NamedTuple):
    """Of each column."""

    change: Array
    """Mean of the group less mean of the others."""
    d: Array
    """Cohen's d: the change in pooled standard deviations; infinite for two groups of one number each."""
    p: Array
    """Corrected over columns."""


def differences(
    values: Any, group: Any, n_permutations: int = 2000, seed: int = 42, rounding: float = 1e-6
) -> Differences:
    """values: [n, width]. group: [n], bool; at least two in the group and two outside. rounding: a column whose standard deviation is no
    larger a part of its mean is all one number. A column with NaN has NaN.

    p: of permutations of the labels, (1 + those whose largest |d| of all columns is as large) / (1 + all); family-wise error over columns
    is kept without assuming them independent. Source: the single-step maxT procedure, Westfall and Young 1993.
    """
    found, labels = np.asarray(values, np.float64), np.asarray(group, bool)
    assert min(labels.sum(), (~labels).sum()) >= 2, labels
    spread = found.std(0)
    varies = ~(spread <= rounding * np.abs(found.mean(0)))
    # of columns that vary, so that sums of squares are exact enough; NaN would be the largest
    scaled = np.where(varies, (found - found.mean(0)) / np.where(spread > 0, spread, 1.0), 0.0)
    is_number = np.isfinite(scaled).all(0)
    d = np.where(is_number, _cohen(np.where(is_number, scaled, 0.0), labels[None])[0], np.nan)
    draw = np.random.default_rng(seed)
    some = scaled[:, is_number] if is_number.any() else np.zeros((len(found), 1))
    largest = np.array([np.abs(_cohen(some, draw.permutation(labels)[None])).max() for _ in range(n_permutations)])
    # the labels as they are come up among the permutations, too: rounding must not make them smaller
    exceed = (largest[:, None] >= np.abs(d) - 1e-9).sum(0)
    change = found[labels].mean(0) - found[~labels].mean(0)
    return Differences(change, d, np.where(np.isnan(d), np.nan, (1 + exceed) / (1 + n_permutations)))


def _cohen(values: Array, labels: Any) -> Array:
    """values: [n, width], each column of mean 0. labels: [m, n], bool, all rows with equally many. Returns d: [m, width]."""
    chosen = labels.astype(np.float64)
    n, n_in = len(values), int(labels[0].sum())
    n_out = n - n_in
    inside = chosen @ values  # [m, width]; outside is its negative, for all sum to 0
    squares = (values**2).sum(0) - inside**2 / n_in - inside**2 / n_out
    change = inside / n_in + inside / n_out
    deviation = np.sqrt(np.maximum(squares, 0) / (n - 2))
    unsaid = np.where(np.abs(change) > 1e-9, np.copysign(np.inf, change), 0.0)  # groups of one number each
    found: Array = np.divide(change, deviation, out=unsaid, where=deviation > 1e-9)
    return found

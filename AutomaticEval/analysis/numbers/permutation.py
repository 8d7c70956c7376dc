"""A permutation test over many columns: how far two groups differ, and how often chance alone gives as large a difference."""

from __future__ import annotations

from math import comb
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


METHOD = "labels of the prompts permuted, corrected by the largest |d| over all heads of a category (single-step maxT)"


class Differences(NamedTuple):
    """How two groups differ in each column, [width] each."""

    change: Array
    """The mean of the group minus the mean of the others."""
    d: Array
    """Cohen's d: the change in pooled standard deviations. It is infinite when each group is one number throughout."""
    p: Array
    """The p value, corrected for the number of columns."""


def differences(
    values: Any, group: Any, n_permutations: int = 2000, seed: int = 42, rounding: float = 1e-6
) -> Differences:
    """Change, Cohen's d and corrected p of each column. A column with NaN gives NaN.

    values: [n, width]. group: [n], bool; at least two rows in the group and two outside. rounding: a column whose standard deviation is at
    most this part of its mean counts as one number throughout.

    p is (1 + the permutations of the labels whose largest |d| over all columns is at least this column's |d|) / (1 + all permutations).
    This bounds the probability of any false positive among the columns, and does not assume that columns are independent.
    Source: the single-step maxT procedure, Westfall and Young 1993.
    """
    table, labels = np.asarray(values, np.float64), np.asarray(group, bool)
    assert min(labels.sum(), (~labels).sum()) >= 2, labels
    spread = table.std(0)
    varies = ~(spread <= rounding * np.abs(table.mean(0)))
    # columns are scaled so that sums of squares are exact enough; a column that does not vary becomes 0
    scaled = np.where(varies, (table - table.mean(0)) / np.where(spread > 0, spread, 1.0), 0.0)
    is_number = np.isfinite(scaled).all(0)
    d = np.where(is_number, _cohen(np.where(is_number, scaled, 0.0), labels), np.nan)
    source = np.random.default_rng(seed)
    # NaN would be the largest |d| of every permutation
    compared = scaled[:, is_number] if is_number.any() else np.zeros((len(table), 1))
    largest = np.array([_between(compared, source.permutation(labels)).max() for _ in range(n_permutations)])
    own = _between(np.where(is_number, scaled, 0.0), labels)
    # a permutation can be the true labels, or their mirror image: 1e-9 keeps rounding from making its share the smaller one
    n_as_large = (largest[:, None] >= own * (1 - 1e-9) - 1e-12).sum(0)
    change = table[labels].mean(0) - table[~labels].mean(0)
    return Differences(change, d, np.where(np.isnan(d), np.nan, (1 + n_as_large) / (1 + n_permutations)))


def least_p(n_in: int, n_out: int, n_permutations: int) -> float:
    """The smallest p value that two groups of these sizes can have; of equal groups, each division gives the same |d| as its mirror image."""
    of_divisions = (1 + (n_in == n_out)) / comb(n_in + n_out, n_in)
    return max(of_divisions, 1 / (1 + n_permutations))


def _between(values: Array, labels: Any) -> Array:
    """The share of each column's squares that the difference of the groups is: [width], 0 to 1. It grows with |d|, and nothing cancels in it.

    values: [n, width], each column of mean 0 and standard deviation 1, or all 0. labels: [n], bool.
    """
    n, n_in = len(values), int(labels.sum())
    inside = labels.astype(np.float64) @ values  # sums over the group; those over the others are the negative
    share: Array = inside**2 * (1 / n_in + 1 / (n - n_in)) / n
    return share


def _cohen(values: Array, labels: Any) -> Array:
    """Cohen's d: [width]. values: [n, width]. labels: [n], bool."""
    groups = [values[labels], values[~labels]]
    change = groups[0].mean(0) - groups[1].mean(0)
    squares = sum(((each - each.mean(0)) ** 2).sum(0) for each in groups)
    deviation = np.sqrt(squares / (len(values) - 2))
    without_spread = np.where(np.abs(change) > 1e-9, np.copysign(np.inf, change), 0.0)
    d: Array = np.divide(change, deviation, out=without_spread, where=deviation > 1e-9)
    return d

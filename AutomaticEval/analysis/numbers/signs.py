"""A test of paired changes by their signs: how often chance alone gives as large a change anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from AutomaticEval.analysis.numbers.skewed_t import Array

N_DRAWN = 2000
"""How many patterns of signs are drawn when there are more."""
METHOD = "signs of the prompts' changes turned, corrected by the largest change over all places (single-step maxT)"


def p_values(values: Any, seed: int = 42) -> Array:
    """The p value of each column's mean, corrected for all columns; NaN for a column without values.

    values: [n, width], the change of each prompt in each place; NaN does not count.

    The null hypothesis is that each prompt's changes are as likely up as down, all places turned together. A column's statistic is |sum| / sqrt(sum
    of squares), which grows with Student's |t|. p is the part of all 2^n patterns of signs whose largest statistic is at least this column's; of
    more patterns than N_DRAWN so many are drawn, and the true one counts among them.
    Source: Fisher 1935; for many columns the single-step maxT procedure, Westfall and Young 1993.
    """
    table = np.asarray(values, np.float64)
    is_known = ~np.isnan(table).all(0)
    table = np.nan_to_num(table, nan=0.0)
    scale = np.abs(table).max(0, initial=0.0)
    table = table / np.where(scale > 0, scale, 1.0)
    size = np.sqrt((table**2).sum(0))
    table = table / np.where(size > 0, size, 1.0)
    largest = np.abs(_patterns(len(table), seed) @ table).max(1, initial=0.0)  # [patterns]
    found = np.abs(table.sum(0))
    # the true pattern is among them: 1e-9 keeps rounding from making it the smaller one
    p = (largest[:, None] >= found - 1e-9).mean(0)
    corrected: Array = np.where(is_known, p, np.nan)
    return corrected


def _patterns(n: int, seed: int) -> Array:
    """Patterns of signs, the true one among them: [patterns, n] of 1 and -1. All of them when they are few."""
    if 2**n <= N_DRAWN:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        every: Array = (1 - 2 * bits).astype(np.float64)
        return every
    drawn = np.random.default_rng(seed).integers(0, 2, (N_DRAWN, n)) * 2.0 - 1.0
    return np.concatenate([np.ones((1, n)), drawn])


def least_p(n: int) -> float:
    """The smallest p value that n changes can have."""
    return min(1.0, 2.0 ** (1 - n))

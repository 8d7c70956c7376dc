"""The interval of a mean that holds for few and for skewed values: Student's t, whose longer side is stretched by the skewness."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Array = np.ndarray[Any, np.dtype[np.float64]]

LEVEL = 0.95
LEAST = 5
"""Of fewer values no interval is made: none that holds is narrow enough to say anything."""
EXPANSION = 6.0
"""Few values hide the tail that they come from: their skewness is taken 1 + EXPANSION / n times as large. Chosen by simulation (decision 0025)."""
MOST_STRETCH = 2.5
"""The largest exponent of the stretch, with which a side is 4.5 times as long as Student's."""
METHOD = "Student's t, its longer side stretched by the skewness of the values (docs/numbers.md); none for fewer than 5 values"


class Spread(NamedTuple):
    """What an interval needs to know of some columns of values, [width] each."""

    n: Array
    mean: Array
    """NaN for a column without values. A column of one number has exactly that number."""
    std: Array
    """With n - 1. Exactly 0 for a column of one number, and NaN for fewer than two values."""
    skewness: Array
    """Unbiased (G1). 0 for fewer than three values and for columns of one number."""


def spread(values: Any) -> Spread:
    """The spread of each column. values: [n, width]; NaN does not count."""
    table = np.asarray(values, np.float64)
    known = ~np.isnan(table)
    n = known.sum(0).astype(np.float64)
    low = np.where(known, table, np.inf).min(0, initial=np.inf)
    high = np.where(known, table, -np.inf).max(0, initial=-np.inf)
    is_one_number = low == high
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, table, 0.0).sum(0) / n
        mean = np.where(is_one_number, low, np.clip(mean, low, high))
        away = np.where(known & ~is_one_number, table - mean, 0.0)
        scale = np.abs(away).max(0, initial=0.0)
        away = np.where(scale > 0, away / scale, 0.0)  # squares and cubes neither overflow nor vanish
        deviation = np.sqrt((away**2).sum(0) / n)
        cubes = np.where(deviation > 0, (away**3).sum(0) / n / deviation**3, 0.0)
        skewness = np.where(n > 2, cubes * np.sqrt(n * (n - 1)) / (n - 2), 0.0)
        std = np.where(n > 1, deviation * scale * np.sqrt(n / (n - 1)), np.nan)
    return Spread(n, mean, std, skewness)


def interval(of: Spread, level: float = LEVEL) -> tuple[Array, Array]:
    """The low and the high end of each column's interval, [width] each; NaN for fewer than LEAST values.

    level: how often the interval holds the true mean. An interval always contains the mean that it is of.
    """
    enough = of.n >= LEAST
    n = np.where(enough, of.n, LEAST)
    t = stats.t.ppf((1 + level) / 2, n - 1)
    exponent = np.minimum(MOST_STRETCH, t * np.abs(of.skewness) * (1 + EXPANSION / n) / np.sqrt(n))
    stretch = np.where(exponent > 1e-8, np.expm1(exponent) / np.where(exponent > 1e-8, exponent, 1.0), 1.0)
    reach = t * of.std / np.sqrt(n)
    low = of.mean - reach * np.where(of.skewness < 0, stretch, 1.0)
    high = of.mean + reach * np.where(of.skewness > 0, stretch, 1.0)
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


def of_family(n_comparisons: int) -> float:
    """The level of each of several intervals, with which all of them together hold at LEVEL. Source: Bonferroni."""
    return 1 - (1 - LEVEL) / max(1, n_comparisons)


def without_interval(n: int) -> str | None:
    """Why n values have no interval, as a sentence; None when they have one."""
    if n >= LEAST:
        return None
    return f"{n} value{'' if n == 1 else 's'}: an interval needs {LEAST} at least."

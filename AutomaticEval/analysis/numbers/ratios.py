"""Which part of a difference comes with something: a ratio of sums over pairs, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from AutomaticEval.analysis.numbers import signs, skewed_t
from AutomaticEval.analysis.numbers.estimate import effect_sizes, estimates_of
from AutomaticEval.analysis.numbers.skewed_t import Array
from AutomaticEval.analysis.result import Part

SMALL = 0.1
"""A pair whose difference is below this part of the median difference is left out."""
METHOD = (
    f"sum of what was moved / sum of the differences; pairs below {SMALL} of the median difference are left out; interval: jackknife, one "
    f"pair left out at a time, with {skewed_t.METHOD}"
)
P_METHOD = f"of what was moved: {signs.METHOD}"


def too_small(wholes: Any) -> Any:
    """Whether each pair's difference is too small to carry meaning, or no number: 0, or below SMALL of the median size. wholes: [n]. Returns [n], bool."""
    sizes = np.abs(np.asarray(wholes, np.float64))
    known = np.isfinite(sizes)
    return ~known | ~(sizes > 0) | (sizes < SMALL * (np.median(sizes[known]) if known.any() else 0.0))


def parts_of(moved: Any, wholes: Any, *, seed: int = 42) -> list[Part]:
    """For each column the sum of what was moved, divided by the sum of the differences.

    moved: [n, width], of each pair in each place; NaN does not count. wholes: [n], the whole difference of each pair. Pairs with a difference
    below 0 count with the sign of both turned, so that differences never cancel. Pairs that are `too_small` are left out.
    """
    table, whole = np.asarray(moved, np.float64), np.asarray(wholes, np.float64)
    keeps = ~too_small(whole)
    table, whole = table[keeps] * np.sign(whole[keeps])[:, None], np.abs(whole[keeps])
    estimates = estimates_of(_jackknifed(table, whole))
    rows = zip(estimates, effect_sizes(table), signs.p_values(table, seed), strict=True)
    return [
        Part(**vars(each), d=d, p=None if np.isnan(p) else float(p), n_left_out=int((~keeps).sum()))
        for each, d, p in rows
    ]


def part_of(moved: Sequence[float], wholes: Sequence[float], *, seed: int = 42) -> Part:
    """`parts_of` in one place. moved, wholes: [n], of each pair."""
    return parts_of(np.asarray(moved, np.float64)[:, None], wholes, seed=seed)[0]


def _jackknifed(moved: Array, wholes: Array) -> skewed_t.Spread:
    """The part of each column, and how much the pairs, each left out in turn, move it: [width] each.

    moved: [n, width]. wholes: [n], above 0. The spread is of (n - 1) times the part of all pairs minus the part without one pair.
    Source: Tukey's pseudo-values; Efron and Tibshirani 1993, chapter 11.
    """
    known = ~np.isnan(moved)
    whole = np.where(known, wholes[:, None], 0.0)
    total, n = whole.sum(0), known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.nansum(moved, 0) / total
        moves = (n - 1) * (moved - part * whole) / (total - whole)
    spread = skewed_t.spread(np.where(known & (n > 1), moves, np.nan))
    return spread._replace(n=n.astype(np.float64), mean=part)

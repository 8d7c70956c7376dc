"""How sure a mean is: a bootstrap interval, from the means of resamples that are drawn with replacement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from AutomaticEval.analysis.result import Estimate

N_RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)


def mean_interval(values: Sequence[float], seed: int = 42) -> Estimate:
    """The mean of some values with its 95 % bootstrap interval."""
    return mean_intervals(np.asarray(values, np.float64)[:, None], seed)[0]


def mean_intervals(values: Any, seed: int = 42) -> list[Estimate]:
    """The mean of each column with its 95 % bootstrap interval. Every column uses the same resamples of rows.

    values: [n, width]. Returns `width` estimates.
    """
    table = np.asarray(values, np.float64)
    n = len(table)
    if n < 2:
        means = [float(mean) for mean in table[0]] if n else [None] * table.shape[1]
        return [Estimate(mean, None, n) for mean in means]
    draws = np.random.default_rng(seed).integers(0, n, (N_RESAMPLES, n))
    weights = np.stack([np.bincount(draw, minlength=n) for draw in draws]) / n  # [N_RESAMPLES, n]
    low, high = np.percentile(weights @ table, PERCENTILES, axis=0)
    return [
        Estimate(float(mean), (float(one), float(other)), n)
        for mean, one, other in zip(table.mean(0), low, high, strict=True)
    ]


def resampled(statistic: Callable[[Any], float | None], n: int, seed: int) -> tuple[list[float] | None, int]:
    """The 95 % bootstrap interval [low, high] of any statistic of n things, and the number of resamples it is made of.

    statistic: takes an index array [n], and returns None for a resample in which it is not defined. Such resamples are left out; the
    interval is None when all are.
    """
    source = np.random.default_rng(seed)
    values = (statistic(source.integers(0, n, n)) for _ in range(N_RESAMPLES))
    defined = [value for value in values if value is not None]
    interval = [float(value) for value in np.percentile(defined, PERCENTILES)] if defined else None
    return interval, len(defined)

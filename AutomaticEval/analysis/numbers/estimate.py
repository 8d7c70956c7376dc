"""How sure a mean is: percentiles of the means of samples drawn again, with replacement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

N_RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)


def mean_interval(values: Sequence[float], seed: int = 42) -> dict[str, Any]:
    """mean, its 95 % bootstrap interval [low, high] (None with fewer than two values), and n."""
    found = np.asarray(values, np.float64)
    return mean_intervals(found[:, None], seed)[0]


def mean_intervals(values: Any, seed: int = 42) -> list[dict[str, Any]]:
    """The same of each column of values [n, width]."""
    found = np.asarray(values, np.float64)
    n = len(found)
    if n < 2:
        means = [float(mean) for mean in found[0]] if n else [None] * found.shape[1]
        return [{"mean": mean, "interval": None, "n": n} for mean in means]
    drawn = np.random.default_rng(seed).integers(0, n, (N_RESAMPLES, n))
    times = (
        np.stack([np.bincount(each, minlength=n) for each in drawn]) / n
    )  # [N_RESAMPLES, n]: how often each was drawn
    low, high = np.percentile(times @ found, PERCENTILES, axis=0)
    return [
        {"mean": float(mean), "interval": [float(one), float(other)], "n": n}
        for mean, one, other in zip(found.mean(0), low, high, strict=True)
    ]


def resampled(statistic: Callable[[Any], float | None], n: int, seed: int) -> tuple[list[float] | None, int]:
    """The percentiles of a statistic over resamples of n things, and in how many resamples it could be computed.

    statistic: takes an index array [n], and returns None where it cannot be computed. The percentiles are None when it never could.
    """
    draw = np.random.default_rng(seed)
    drawn = (statistic(draw.integers(0, n, n)) for _ in range(N_RESAMPLES))
    known = [value for value in drawn if value is not None]
    return ([float(value) for value in np.percentile(known, PERCENTILES)] if known else None), len(known)

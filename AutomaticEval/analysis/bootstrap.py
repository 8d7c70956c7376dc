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
    if len(found) < 2:
        return {"mean": float(found.mean()) if len(found) else None, "interval": None, "n": len(found)}
    interval, _ = resampled(lambda index: float(found[index].mean()), len(found), seed)
    return {"mean": float(found.mean()), "interval": interval, "n": len(found)}


def resampled(statistic: Callable[[Any], float | None], n: int, seed: int) -> tuple[list[float] | None, int]:
    """The percentiles of a statistic of n things drawn again, and how often it was one; None when it never was.

    statistic: of an index array [n]; None where there is none.
    """
    draw = np.random.default_rng(seed)
    drawn = (statistic(draw.integers(0, n, n)) for _ in range(N_RESAMPLES))
    known = [value for value in drawn if value is not None]
    return ([float(value) for value in np.percentile(known, PERCENTILES)] if known else None), len(known)

"""How sure a mean is: percentiles of the means of samples drawn again, with replacement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

N_RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)


def mean_interval(values: Sequence[float], seed: int = 42) -> dict[str, Any]:
    """mean, its 95 % bootstrap interval [low, high] (None with fewer than two values), and n."""
    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return {"mean": float(found.mean()) if len(found) else None, "interval": None, "n": len(found)}
    draw = np.random.default_rng(seed)
    means = np.array([found[draw.integers(0, len(found), len(found))].mean() for _ in range(N_RESAMPLES)])
    low, high = np.percentile(means, PERCENTILES)
    return {"mean": float(found.mean()), "interval": [float(low), float(high)], "n": len(found)}

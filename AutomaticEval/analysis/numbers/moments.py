"""Mean, spread and range of numbers that stream by: what is remembered does not grow with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Moments:
    """Of rows [n, width], column by column, in float64."""

    width: int
    n: int = 0

    def __post_init__(self) -> None:
        self.mean: Array = np.zeros(self.width)
        self._squares: Array = np.zeros(self.width)  # sum of squared differences from the mean
        self.low: Array = np.full(self.width, np.inf)
        self.high: Array = np.full(self.width, -np.inf)

    @property
    def std(self) -> Array:
        """Of the rows themselves, not an estimate for others."""
        found: Array = np.sqrt(self._squares / max(1, self.n))
        return found

    def add(self, rows: Any) -> None:
        """rows: [n, width]."""
        new = np.asarray(rows, np.float64)
        if not len(new):
            return
        mean = new.mean(0)
        total = self.n + len(new)
        apart = mean - self.mean
        self._squares += ((new - mean) ** 2).sum(0) + apart**2 * self.n * len(new) / total
        self.mean = self.mean + apart * len(new) / total
        self.low, self.high = np.minimum(self.low, new.min(0)), np.maximum(self.high, new.max(0))
        self.n = total

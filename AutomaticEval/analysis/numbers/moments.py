"""Mean, spread and range of rows that arrive a batch at a time: memory does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Moments:
    """Mean, standard deviation, minimum and maximum of each column, in float64.

    width: the number of columns. n: the rows added so far. mean, std, low, high: [width].
    """

    width: int
    n: int = 0

    def __post_init__(self) -> None:
        self.mean: Array = np.zeros(self.width)
        self._squares: Array = np.zeros(self.width)  # sum of squared differences from the mean
        self.low: Array = np.full(self.width, np.inf)
        self.high: Array = np.full(self.width, -np.inf)

    @property
    def std(self) -> Array:
        """The standard deviation of the rows themselves (divided by n, not by n - 1)."""
        deviation: Array = np.sqrt(self._squares / max(1, self.n))
        return deviation

    def add(self, rows: Any) -> None:
        """rows: [n, width]. Source: the parallel update of mean and variance, Chan, Golub and LeVeque 1979."""
        new = np.asarray(rows, np.float64)
        if not len(new):
            return
        mean = new.mean(0)
        total = self.n + len(new)
        difference = mean - self.mean
        self._squares += ((new - mean) ** 2).sum(0) + difference**2 * self.n * len(new) / total
        self.mean = self.mean + difference * len(new) / total
        self.low, self.high = np.minimum(self.low, new.min(0)), np.maximum(self.high, new.max(0))
        self.n = total

"""Probes of several classes: one for each, which tells it from the rest, and together they give probabilities whose sum is 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import logsumexp

from AutomaticEval.analysis.probes.linear import Linear

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OneVsRest:
    """The probes of all classes, in their order."""

    probes: Sequence[Linear]

    @classmethod
    def of(cls, probes: Sequence[Linear]) -> OneVsRest:
        """probes: of one training part, whose rows are standardised in one way."""
        first = probes[0]
        return cls([replace(each, shift=first.shift, scale=first.scale) for each in probes])

    def log_odds(self, rows: Any) -> Array:
        """[n_classes, n]: of the probabilities that sum to 1."""
        return normalised(np.stack([each.log_odds(rows) for each in self.probes]))

    @property
    def strength(self) -> float | None:
        """The one that most classes chose; of several, the smallest."""
        return most_frequent([each.strength for each in self.probes if each.strength is not None])


def most_frequent(strengths: Sequence[float]) -> float:
    """Of several that are as frequent, the smallest number, which regularises most."""
    counted = Counter(strengths)
    return min(counted, key=lambda strength: (-counted[strength], strength))


def normalised(log_odds: Array) -> Array:
    """The log-odds of probabilities that are divided by their sum over classes, so that it is 1.

    log_odds: [n_classes, n], each class against the rest. Small differences near 0 and 1 are kept, which dividing probabilities would round away.
    """
    logs = -np.logaddexp(0, -log_odds.astype(np.float64))
    others = [logsumexp(np.delete(logs, number, 0), axis=0) for number in range(len(logs))]
    odds: Array = logs - np.stack(others)
    return odds

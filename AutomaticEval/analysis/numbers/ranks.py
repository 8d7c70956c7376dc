"""A rank correlation over heads, with an interval for other layers and other texts: heads of a layer are alike, and are not independent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.numbers.skewed_t import LEAST, LEVEL, Array
from AutomaticEval.analysis.result import Estimate

METHOD = "jackknife on Fisher's scale: one layer left out at a time, and one group of texts; Student's t"
MOST = 1 - 1e-12
"""The largest correlation on Fisher's scale, on which 1 is infinite."""


class ByGroup(NamedTuple):
    """The strengths of heads in each group of texts."""

    first: Array
    """[n_groups, n_heads]: the mean over the group's tokens, of the numbers that are correlated."""
    second: Array
    n_tokens: Array
    """[n_groups], above 0."""


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho over heads."""

    rho: float | None
    """None when one side is the same number everywhere."""
    interval: tuple[float, float] | None
    """95 %, for other layers and other texts. None for fewer than five layers."""
    n_heads: int
    n_layers: int
    n_text_groups: int
    """0 when only the means over all texts are known: then the interval is for other layers alone."""
    interval_over: str
    """layers and texts, or layers."""
    within_layers: Estimate
    """The mean over layers of the rho of a layer's heads."""
    reason: str | None
    """Why there is no interval."""


def rank_correlation(first: Array, second: Array, layers: Array, by_group: ByGroup | None = None) -> RankCorrelation:
    """Spearman's rho of two numbers of each head. first, second, layers: [n_heads]. by_group: the same numbers in LEAST groups of texts or more.

    Source: Efron and Tibshirani 1993, chapter 11. The variances of both jackknives are added.
    """
    n_layers = len(np.unique(layers))
    rho = spearman(first, second)
    by_layer = [spearman(first[layers == layer], second[layers == layer]) for layer in np.unique(layers)]
    within = mean_interval([each for each in by_layer if each is not None])
    if by_group is not None and len(by_group.n_tokens) < LEAST:
        by_group = None
    n_groups = 0 if by_group is None else len(by_group.n_tokens)
    over = "layers" if by_group is None else "layers and texts"
    interval, reason = None, None
    if rho is None:
        reason = "one side is the same number in every head."
    elif n_layers < LEAST:
        reason = f"{n_layers} layers: an interval needs {LEAST} at least."
    else:
        without_one = [_without_layers(first, second, layers)]
        if by_group is not None:
            without_one.append(_without_groups(by_group))
        interval = _interval(rho, without_one)
    return RankCorrelation(rho, interval, len(first), n_layers, n_groups, over, within, reason)


def spearman(first: Any, second: Any) -> float | None:
    """Spearman's rho; None for fewer than two pairs, and when one side is the same number everywhere."""
    one, other = stats.rankdata(first), stats.rankdata(second)
    if len(one) < 2 or one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _without_layers(first: Array, second: Array, layers: Array) -> list[float | None]:
    """rho without each layer in turn."""
    return [spearman(first[layers != layer], second[layers != layer]) for layer in np.unique(layers)]


def _without_groups(groups: ByGroup) -> list[float | None]:
    """rho without each group of texts in turn."""
    weights = groups.n_tokens[:, None]
    sums = [(each * weights).sum(0) for each in (groups.first, groups.second)]
    left = groups.n_tokens.sum() - groups.n_tokens
    return [
        spearman(
            *((total - each[row] * weights[row]) / left[row] for total, each in zip(sums, groups[:2], strict=True))
        )
        for row in range(len(left))
    ]


def _interval(rho: float, without_one: list[list[float | None]]) -> tuple[float, float]:
    """without_one: for each kind of thing that was sampled, rho without each of them in turn."""
    variance, freedom = 0.0, np.inf
    for each in without_one:
        z = np.arctanh(np.clip([value for value in each if value is not None], -MOST, MOST))
        variance += (len(z) - 1) / len(z) * ((z - z.mean()) ** 2).sum()
        freedom = min(freedom, len(z) - 1)
    reach = stats.t.ppf((1 + LEVEL) / 2, freedom) * variance**0.5
    z = np.arctanh(np.clip(rho, -MOST, MOST))
    low, high = np.tanh([z - reach, z + reach])
    return min(float(low), rho), max(float(high), rho)

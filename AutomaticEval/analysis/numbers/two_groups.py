"""How the means of two groups of prompts differ, with an interval that holds for few prompts and for groups that vary differently."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from AutomaticEval.analysis.numbers.estimate import pairs_of
from AutomaticEval.analysis.numbers.skewed_t import LEAST, LEVEL, of_family, without_interval
from AutomaticEval.analysis.result import Estimate


def mean_differences(one: Any, other: Any) -> list[Estimate]:
    """The mean of each column of one group minus that of the other, with the 95 % interval of Welch's t.

    one: [n, width]. other: [m, width]. The n of an estimate is that of `one`. No interval where a group has fewer than LEAST; no mean for an
    empty one. Source: Welch 1947.
    """
    groups = [np.asarray(each, np.float64) for each in (one, other)]
    n, m = map(len, groups)
    width = groups[0].shape[1]
    if not n or not m:
        return [Estimate(None, None, n, reason=without_interval(0))] * width
    change = groups[0].mean(0) - groups[1].mean(0)
    if min(n, m) < LEAST:
        return [Estimate(float(each), None, n, reason=without_interval(min(n, m))) for each in change]
    errors = [each.var(0, ddof=1) / len(each) for each in groups]  # squared
    error = errors[0] + errors[1]
    freedom = error**2 / np.maximum(errors[0] ** 2 / (n - 1) + errors[1] ** 2 / (m - 1), np.finfo(float).tiny)
    reaches = [
        np.where(error > 0, stats.t.ppf((1 + level) / 2, np.maximum(freedom, 1)), 0.0) * np.sqrt(error)
        for level in (LEVEL, of_family(width))
    ]
    alone, together = (pairs_of(change - reach, change + reach) for reach in reaches)
    return [
        Estimate(float(mean), interval, n, simultaneous if width > 1 else None)
        for mean, interval, simultaneous in zip(change, alone, together, strict=True)
    ]

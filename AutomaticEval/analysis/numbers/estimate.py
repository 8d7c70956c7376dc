"""How sure means are: estimates with their intervals, alone and together with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from AutomaticEval.analysis.numbers import signs, skewed_t
from AutomaticEval.analysis.numbers.skewed_t import Array
from AutomaticEval.analysis.result import Effect, Estimate

TOGETHER = "Bonferroni: all intervals together hold at this level"


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean of some values with its 95 % interval."""
    return mean_intervals(np.asarray(values, np.float64)[:, None])[0]


def mean_intervals(values: Any) -> list[Estimate]:
    """The mean of each column with its 95 % interval, and the interval at the level of all columns together.

    values: [n, width]; NaN does not count. Returns `width` estimates.
    """
    return estimates_of(skewed_t.spread(values))


def estimates_of(of: skewed_t.Spread) -> list[Estimate]:
    """An estimate for each column of a spread."""
    alone, together = ends(of, skewed_t.LEVEL), ends(of, skewed_t.of_family(len(of.n)))
    return [
        Estimate(
            float(mean) if n else None,
            one,
            int(n),
            both if len(of.n) > 1 else None,
            skewed_t.without_interval(int(n)),
        )
        for mean, n, one, both in zip(of.mean, of.n, alone, together, strict=True)
    ]


def effects(values: Any, *, seed: int = 42) -> list[Effect]:
    """The mean of each column of changes as `mean_intervals` gives it, with Cohen's d and a p value that is corrected for all columns.

    values: [n, width], the change of each prompt in each place; NaN does not count. seed: draws signs when there are too many prompts for all.
    """
    p = signs.p_values(values, seed)
    sizes = effect_sizes(values)
    return [
        Effect(**vars(each), d=size, p=None if np.isnan(chance) else float(chance))
        for each, size, chance in zip(mean_intervals(values), sizes, p, strict=True)
    ]


def effect_sizes(values: Any) -> list[float | None]:
    """The mean of each column in its standard deviations; None where all values are one number, or there is one."""
    of = skewed_t.spread(values)
    return [float(mean / std) if std > 0 else None for mean, std in zip(of.mean, of.std, strict=True)]


def ends(of: skewed_t.Spread, level: float) -> list[tuple[float, float] | None]:
    """The interval of each column as a tuple."""
    return pairs_of(*skewed_t.interval(of, level))


def pairs_of(low: Array, high: Array) -> list[tuple[float, float] | None]:
    """(low, high) of each column, None where there is no interval."""
    return [
        None if np.isnan(one) or np.isnan(other) else (float(one), float(other))
        for one, other in zip(low, high, strict=True)
    ]


def methods(n_comparisons: int = 1, *, p: str | None = None, is_together: bool = True, **more: Any) -> dict[str, Any]:
    """What a result file says of its intervals and p values.

    p: how p values were made, and corrected for the comparisons. is_together: whether there are simultaneous intervals. more: what else it says.
    """
    together = {"simultaneous": TOGETHER} if n_comparisons > 1 and is_together else {}
    with_p = {} if p is None else {"p": p}
    about = {"interval": skewed_t.METHOD, "level": skewed_t.LEVEL, "comparisons": n_comparisons}
    return {**about, **together, **with_p, **more}

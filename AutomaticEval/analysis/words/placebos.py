"""Placebo words: as many other tokens of the same prompts, drawn at random in place of a category's keywords."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from AutomaticEval.analysis.words.targets import Target

N_PLACEBOS = 99
"""How many sets of placebo words stand beside the keywords of a category. The smallest p is 1 / (1 + this)."""


def placebo_targets(target: Target, tokens: Iterable[int], source: np.random.Generator) -> list[Target]:
    """Targets with as many tokens on both sides as one has, drawn from other tokens; none when there are too few others.

    tokens: those of the prompts.
    """
    n_answer, n_against = len(target.answer), len(target.against)
    others = sorted(set(tokens) - {*target.answer, *target.against})
    if len(others) < 2 * (n_answer + n_against):  # or the sets would be nearly the same
        return []
    drawn = (source.choice(others, n_answer + n_against, replace=False).tolist() for _ in range(N_PLACEBOS))
    return [Target(each[:n_answer], each[n_answer:]) for each in drawn]


def p_beside_placebos(values: Any, placebos: Sequence[Any] | NDArray[np.float64]) -> NDArray[np.float64]:
    """How often placebo words alone give a number as large: p of each column, corrected for the number of columns. NaN without placebos.

    values: [width]. placebos: [n_placebos, width]. Columns are compared in standard deviations over placebos, and p is (1 + the placebos
    whose largest number over all columns is at least this column's) / (1 + all placebos). Source: single-step maxT, Westfall and Young 1993.
    """
    own, others = np.asarray(values, np.float64), np.asarray(placebos, np.float64).reshape(-1, len(values))
    if not len(others):
        return np.full(len(own), np.nan)
    spread = np.sqrt((np.vstack([own, others]) ** 2).mean(0))
    spread = np.where(spread > 0, spread, 1.0)
    largest = (np.abs(others) / spread).max(1)
    n_as_large = (largest[:, None] >= np.abs(own) / spread - 1e-9).sum(0)
    p: NDArray[np.float64] = (1 + n_as_large) / (1 + len(others))
    return p

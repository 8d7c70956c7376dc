"""Two scores of the same questions: the change, its interval over questions, and McNemar's test of the questions that flipped."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.stats import binomtest

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.result import Estimate

METHOD = "McNemar's exact test of the questions that flipped; none for metrics that are not 0 or 1. p_corrected: Holm, over all lines"


@dataclass(frozen=True)
class PairedChange:
    """What became of a score, over questions that have one before and after."""

    n: int
    before: float
    after: float
    """The means of the questions' scores."""

    difference: Estimate
    """after - before, paired by document: one that was answered several times is one unit."""

    n_gained: int | None
    """Wrong before, right after. None for scores other than 0 and 1, as is n_lost."""

    n_lost: int | None
    p: float | None
    """McNemar's exact test: how often chance alone would divide the flipped questions as unevenly. None for scores other than 0 and 1, and where
    documents were answered several times."""

    p_corrected: float | None = None
    """p, corrected for all changes that were measured together."""


Change = TypeVar("Change", bound=PairedChange)


def paired_change(before: Sequence[float], after: Sequence[float], documents: Sequence[Hashable]) -> PairedChange:
    """The change of the score. before, after: of each question, at least one. documents: what each question is about."""
    one, other = np.asarray(before, np.float64), np.asarray(after, np.float64)
    changes: dict[Hashable, list[float]] = {}
    for document, change in zip(documents, (other - one).tolist(), strict=True):
        changes.setdefault(document, []).append(change)
    difference = mean_interval([sum(each) / len(each) for each in changes.values()])
    means = len(one), float(one.mean()), float(other.mean())
    if not np.isin([one, other], (0.0, 1.0)).all():
        return PairedChange(*means, difference, None, None, None)
    gained, lost = int((other > one).sum()), int((other < one).sum())
    p = mcnemar(gained, lost) if len(changes) == len(one) else None
    return PairedChange(*means, difference, gained, lost, p)


def corrected(changes: Sequence[Change]) -> list[Change]:
    """The changes with `p_corrected`. Source: Holm 1979."""
    order = sorted((each.p, place) for place, each in enumerate(changes) if each.p is not None)
    found, largest = list(changes), 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        found[place] = replace(changes[place], p_corrected=largest)
    return found


def mcnemar(n_gained: int, n_lost: int) -> float:
    """The two-sided exact p value: both directions are equally likely for a question that flipped. Source: McNemar 1947."""
    return float(binomtest(n_gained, n_gained + n_lost).pvalue) if n_gained + n_lost else 1.0

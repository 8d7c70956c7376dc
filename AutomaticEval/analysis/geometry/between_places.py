"""How alike the rows of different places are: mean cosines and CKA between all pairs, of one run or of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.analysis.numbers.similarity import cka_between, kernels_of
from AutomaticEval.store.row_array import RowArray

Array = np.ndarray[Any, Any]
MOST_ROWS = 1000
"""Questions over which pairs of places are compared; their kernels are in memory together, 8 MB a place."""
_QUESTIONS_AT_ONCE = 64


class Alike(NamedTuple):
    """[n_places, n_places of the other]: each place with each."""

    cka: Array
    """NaN where the rows of a place are all the same, or there are fewer than four."""

    cosine: Array | None
    """None for places of different widths."""


def alike(one: Sequence[RowArray], other: Sequence[RowArray] | None, advance: Callable[[int], None]) -> Alike:
    """Each place of one list with each of the other, or with those of the same list. The rows of all places are of the same questions.

    advance: is told of each place that is done.
    """
    n = len(one[0])
    several = [one] if other is None else [one, other]
    if n >= 4:
        kernels = [kernels_of((_read(array, advance) for array in arrays), n) for arrays in several]
        cka = cka_between(kernels[0], kernels[-1])
    else:
        cka = np.full((len(one), len(several[-1])), np.nan)
    widths = {array.shape[1] for arrays in several for array in arrays}
    return Alike(cka, _cosines(one, other) if len(widths) == 1 and widths != {1} else None)


def _read(array: RowArray, advance: Callable[[int], None]) -> Array:
    rows: Array = array[:].double().numpy()
    advance(1)
    return rows


def _cosines(one: Sequence[RowArray], other: Sequence[RowArray] | None) -> Array:
    """The mean cosine over the questions, some questions at a time at all places. A row of zeros counts as 0."""
    n = len(one[0])
    sums = np.zeros((len(one), len(one if other is None else other)))
    for start in range(0, n, _QUESTIONS_AT_ONCE):
        stop = min(n, start + _QUESTIONS_AT_ONCE)
        units = _units(one, start, stop)
        sums += np.einsum("pqd,rqd->pr", units, units if other is None else _units(other, start, stop), optimize=True)
    return sums / n


def _units(arrays: Sequence[RowArray], start: int, stop: int) -> Array:
    """[n_places, n, width]: the rows of some questions, with length 1."""
    rows = np.stack([array[start:stop].float().numpy() for array in arrays])
    lengths = np.linalg.norm(rows, axis=2, keepdims=True)
    units: Array = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return units

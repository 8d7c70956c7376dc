"""From rows back to their samples: which samples have a row, and at which position of their sequence it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from AutomaticEval.store.ragged import Array, Ragged


class Origin(NamedTuple):
    """Where a row comes from."""

    samples: list[int]
    """The samples that have it, in ascending order: several where they share what they begin with. `run[samples[0]]` is the first."""

    position: int
    """Its place in the sequence of each of them, from 0."""


class RowOrigins(Sequence[Origin]):
    """`where_from[i]` of the rows of a run. Only numbers of rows are read, and no activations.

    numbers: [n_rows], of the rows. segments: for each sample the half-open ranges of its rows. positions: [n_rows of the run].
    owners: [n_rows], the one sample that each row is meant as; None for all that have it.
    """

    def __init__(self, numbers: Array, segments: Ragged, positions: Any, owners: Array | None = None) -> None:
        self._numbers, self._segments, self._positions, self._owners = numbers, segments, positions, owners

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Origin: ...
    @overload
    def __getitem__(self, at: slice | Sequence[int]) -> list[Origin]: ...
    def __getitem__(self, at: Any) -> Origin | list[Origin]:
        """The origin of one row; for a slice or several numbers, a list."""
        if not isinstance(at, slice) and np.ndim(at) == 0:
            return self[[int(at)]][0]
        if not isinstance(at, slice):
            at = np.asarray(at) if len(at) else np.arange(0)
        numbers = self._numbers[at]
        distinct, inverse = np.unique(numbers, return_inverse=True)
        positions = self._positions[distinct][inverse].tolist()
        owners = (
            [self._samples_of(int(n)) for n in numbers] if self._owners is None else self._owners[at][:, None].tolist()
        )
        return [Origin(samples, position) for samples, position in zip(owners, positions, strict=True)]

    def _samples_of(self, row: int) -> list[int]:
        starts, stops, reach, owners = self._sorted
        first, last = int(np.searchsorted(reach, row, "right")), int(np.searchsorted(starts, row, "right"))
        samples: list[int] = np.unique(owners[first:last][stops[first:last] > row]).tolist()
        return samples

    @cached_property
    def _sorted(self) -> tuple[Array, Array, Array, Array]:
        """[n_ranges] each, in ascending order of start: start, stop, the largest stop so far, and the sample."""
        ranges = self._segments.values[:]
        owners = np.repeat(np.arange(len(self._segments.offset) - 1), np.diff(self._segments.offset))
        order = np.argsort(ranges[:, 0], kind="stable")
        starts, stops = ranges[order].T
        return starts, stops, np.maximum.accumulate(stops), owners[order]

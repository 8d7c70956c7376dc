"""Lists of different lengths, and ranges of numbers, as flat arrays. Knows nothing of what is in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
_SLAB_BYTES = 2**20
"""Small enough for the processor's cache, large enough that the pages on the disk are read back at full speed."""


class Ragged(NamedTuple):
    """Lists of different lengths, one after the other: item i is values[offset[i]:offset[i + 1]]."""

    offset: Array
    values: Any
    """An array, or what is sliced like one."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[Any]], shape: tuple[int, ...] = ()) -> Ragged:
        """shape: of each element."""
        offset = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        values = np.array(list(itertools.chain.from_iterable(lists)), dtype=np.int64).reshape(-1, *shape)
        return cls(offset, values)

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        ends = np.cumsum([0, *(part.offset[-1] for part in parts)], dtype=np.int64)
        offsets = [part.offset[:-1] + end for part, end in zip(parts, ends, strict=False)]
        return cls(np.concatenate([*offsets, ends[-1:]]), chained([part.values for part in parts]))

    def item(self, index: int) -> Array:
        values: Array = self.values[int(self.offset[index]) : int(self.offset[index + 1])]
        return values

    def take(self, order: Array) -> Ragged:
        """The items in another order, or some of them; values that are in files stay there."""
        taken = Taken(self.values, self.offset[:-1][order], self.offset[1:][order])
        return Ragged(taken.offset, taken[:] if isinstance(self.values, np.ndarray) else taken)

    def first_difference(self, other: Ragged) -> int | None:
        """The number of the first item that the other has not; None when all are the same."""
        same = min(len(self.offset), len(other.offset))
        wrong = [np.flatnonzero(self.offset[:same] != other.offset[:same])[:1] - 1]
        if not len(wrong[0]):
            one, two = self.values[:], other.values[:]
            n = min(len(one), len(two))
            at = np.flatnonzero((one[:n] != two[:n]).reshape(n, -1).any(axis=1))[:1]
            wrong.append(np.searchsorted(self.offset, at, "right") - 1)
        wrong_items = np.concatenate(wrong)
        if len(wrong_items):
            return int(wrong_items[0])
        return None if len(self.offset) == len(other.offset) else same - 1


def chained(parts: Sequence[Any]) -> Any:
    """Arrays one after the other; where some are in files, sliced like one, and read when they are asked for."""
    return np.concatenate(parts) if all(isinstance(part, np.ndarray) for part in parts) else Chained(parts)


class Chained:
    """What is sliced like an array, one after the other, sliced like one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = list(parts)
        self._first = np.cumsum([0, *map(len, parts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, at: slice | Array) -> Array:
        if not isinstance(at, slice):
            return self._picked(np.asarray(at))
        start, stop, step = at.indices(len(self))
        assert step == 1
        slices = [self._parts[0][:0]]
        for part, first in zip(self._parts, self._first.tolist(), strict=False):
            if start < first + len(part) and first < stop:
                slices.append(part[max(start - first, 0) : stop - first])
        return np.concatenate(slices)

    def _picked(self, at: Array) -> Array:
        none = self._parts[0][:0]
        values: Array = np.empty((len(at), *none.shape[1:]), none.dtype)
        owner = np.searchsorted(self._first, at, "right") - 1
        for number in np.unique(owner).tolist():
            here = owner == number
            values[here] = self._parts[number][at[here] - self._first[number]]
        return values


class Taken:
    """Ranges of what is sliced like an array, one after the other, sliced like one."""

    def __init__(self, values: Any, start: Array, stop: Array) -> None:
        self._values, self._start = values, start
        self.offset: Array = np.concatenate([[0], np.cumsum(stop - start, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.offset[-1])

    def __getitem__(self, at: slice) -> Array:
        start, stop, step = at.indices(len(self))
        assert step == 1
        if stop <= start:
            return np.asarray(self._values[:0])
        first, last = np.searchsorted(self.offset, [start, stop - 1], "right") - 1
        edges = np.clip(self.offset[first : last + 2], start, stop)
        begins = self._start[first : last + 1] + edges[:-1] - self.offset[first : last + 1]
        values: Array = self._values[indices_of(np.column_stack([begins, begins + np.diff(edges)]))]
        return values


def ranges_of(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Indices as the half-open ranges in which they follow one another: [3, 4, 7] -> [(3, 5), (7, 8)]."""
    array = np.fromiter(indices, dtype=np.int64)
    if not len(array):
        return []
    edges = np.concatenate(([0], np.flatnonzero(np.diff(array) != 1) + 1, [len(array)]))
    return list(zip(array[edges[:-1]].tolist(), (array[edges[1:] - 1] + 1).tolist(), strict=True))


def indices_of(ranges: Array) -> Array:
    """ranges: [n, 2], half-open. Returns every index, one range after the other."""
    if len(ranges) == 1:  # most samples
        return np.arange(*ranges[0])
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    return np.repeat(ranges[:, 1] - ends, lengths) + np.arange(ends[-1] if len(ends) else 0)


def rechunked(slabs: Iterable[Array], n_rows: int) -> Iterator[Array]:
    """The same rows in slabs of n_rows; the last slab may be shorter. Large slabs are cut without a copy."""
    waiting: list[Array] = []
    n_waiting = 0
    for slab in slabs:
        at = 0
        while n_waiting + len(slab) - at >= n_rows:
            stop = at + n_rows - n_waiting
            part = slab[at:stop]
            yield np.concatenate([*waiting, part]) if waiting else part
            waiting, n_waiting, at = [], 0, stop
        if at < len(slab):
            waiting.append(slab[at:])
            n_waiting += len(slab) - at
    if waiting:
        yield np.concatenate(waiting)


def gathered(slabs: Iterable[Array]) -> Iterator[Array]:
    """The same rows, with thousands of small slabs joined into slabs of _SLAB_BYTES."""
    waiting: list[Array] = []
    n_bytes = 0
    for slab in slabs:
        waiting.append(slab)
        n_bytes += slab.nbytes
        if n_bytes >= _SLAB_BYTES:
            yield np.concatenate(waiting) if len(waiting) > 1 else slab
            waiting, n_bytes = [], 0
    if waiting:
        yield np.concatenate(waiting)

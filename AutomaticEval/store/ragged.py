"""Lists of different lengths, and ranges of numbers, as flat arrays. Knows nothing of what is in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Ragged(NamedTuple):
    """Lists of different lengths, one after the other: item i is values[offset[i]:offset[i + 1]]."""

    offset: Array
    """[n_items + 1], ascending."""

    values: Any
    """An array, or an object that is sliced like one."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[Any]], shape: tuple[int, ...] = ()) -> Ragged:
        """lists: of whole numbers. shape: of each element of a list, when it is not one number."""
        offset = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        values = np.array(list(itertools.chain.from_iterable(lists)), dtype=np.int64).reshape(-1, *shape)
        return cls(offset, values)

    @classmethod
    def joined(cls, several: Sequence[Ragged]) -> Ragged:
        """The items of several, one after the other."""
        ends = np.cumsum([0, *(each.offset[-1] for each in several)], dtype=np.int64)
        offsets = [each.offset[:-1] + end for each, end in zip(several, ends, strict=False)]
        return cls(np.concatenate([*offsets, ends[-1:]]), chained([each.values for each in several]))

    def item(self, index: int) -> Array:
        values: Array = self.values[int(self.offset[index]) : int(self.offset[index + 1])]
        return values

    def take(self, order: Array) -> Ragged:
        """The items in another order, or some of them. Values that are in files stay there."""
        taken = Taken(self.values, self.offset[:-1][order], self.offset[1:][order])
        return Ragged(taken.offset, taken[:] if isinstance(self.values, np.ndarray) else taken)

    def first_difference(self, other: Ragged) -> int | None:
        """The number of the first item that the other does not have in its place; None when all are the same."""
        n_offsets = min(len(self.offset), len(other.offset))
        wrong = [np.flatnonzero(self.offset[:n_offsets] != other.offset[:n_offsets])[:1] - 1]
        if not len(wrong[0]):
            one, two = self.values[:], other.values[:]
            n = min(len(one), len(two))
            at = np.flatnonzero((one[:n] != two[:n]).reshape(n, math.prod(one.shape[1:])).any(axis=1))[:1]
            wrong.append(np.searchsorted(self.offset, at, "right") - 1)
        wrong_items = np.concatenate(wrong)
        if len(wrong_items):
            return int(wrong_items[0])
        return None if len(self.offset) == len(other.offset) else n_offsets - 1


def chained(arrays: Sequence[Any]) -> Any:
    """Arrays one after the other. When some of them are in files, the result is sliced like an array, and reads them then."""
    return np.concatenate(arrays) if all(isinstance(each, np.ndarray) for each in arrays) else Chained(arrays)


class Chained:
    """Several arrays, or objects that are sliced like one, which are sliced as one long array."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = list(arrays)
        self._first = np.cumsum([0, *map(len, arrays)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, at: slice | Array) -> Array:
        if not isinstance(at, slice):
            return self._picked(np.asarray(at))
        start, stop, step = at.indices(len(self))
        assert step == 1
        slices = [self._arrays[0][:0]]
        for array, first in zip(self._arrays, self._first.tolist(), strict=False):
            if start < first + len(array) and first < stop:
                slices.append(array[max(start - first, 0) : stop - first])
        return np.concatenate(slices)

    def _picked(self, at: Array) -> Array:
        none = self._arrays[0][:0]
        picked: Array = np.empty((len(at), *none.shape[1:]), none.dtype)
        owner = np.searchsorted(self._first, at, "right") - 1
        for number in np.unique(owner).tolist():
            here = owner == number
            picked[here] = self._arrays[number][at[here] - self._first[number]]
        return picked


class Taken:
    """Ranges of an array, or of an object that is sliced like one. They are sliced as one array, in which they follow one another.

    start, stop: [n_ranges] each.
    """

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
    """Indices as half-open ranges of indices that follow one another: [3, 4, 7] -> [(3, 5), (7, 8)]."""
    array = indices.astype(np.int64) if isinstance(indices, np.ndarray) else np.fromiter(indices, dtype=np.int64)
    if not len(array):
        return []
    edges = np.concatenate(([0], np.flatnonzero(np.diff(array) != 1) + 1, [len(array)]))
    return list(zip(array[edges[:-1]].tolist(), (array[edges[1:] - 1] + 1).tolist(), strict=True))


def indices_of(ranges: Array) -> Array:
    """Every index of half-open ranges [n, 2], one range after the other."""
    if len(ranges) == 1:  # most samples
        return np.arange(*ranges[0])
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    return np.repeat(ranges[:, 1] - ends, lengths) + np.arange(ends[-1] if len(ends) else 0)

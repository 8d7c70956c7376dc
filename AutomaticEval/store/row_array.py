"""Rows of many shards as one: read by number, as an array-like, and as a torch Dataset. Knows nothing of samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from AutomaticEval.errors import StoreError
from AutomaticEval.store.bits import bits_type, from_bits
from AutomaticEval.store.contents.file_contents import Activation
from AutomaticEval.store.hdf5.open import OneSite
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.ragged import Array, ranges_of

_STEP_BYTES = 8 * 2**20


def _other(path: Path) -> StoreError:
    return StoreError(f"{path} has not the rows and sites of its run; restore it from a copy.")


class Kind(NamedTuple):
    """How the rows of one site are stored."""

    dtype: torch.dtype
    """As it is stored."""

    width: int

    @property
    def read_as(self) -> torch.dtype:
        """What is given back: float32 for int8."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype


class ShardedRows:
    """The rows of all shards of a run, numbered over the run. A shard is opened and checked when it is first read.

    first: [n_shards + 1], the number of each shard's first row. open_shard: number -> the checked shard. open_site: number and site ->
    that site alone, which is quicker where no other is asked for.
    """

    def __init__(
        self,
        kinds: dict[str, Kind],
        first: Array,
        open_shard: Callable[[int], Shard],
        open_site: Callable[[int, str], OneSite] | None = None,
    ) -> None:
        self.kinds, self.first, self._open_shard, self._open_site = kinds, first, open_shard, open_site
        self._opened: dict[int, Shard] = {}
        self._sites: dict[int, OneSite] = {}

    @property
    def keys(self) -> list[str]:
        return list(self.kinds)

    @property
    def n_rows(self) -> int:
        return int(self.first[-1])

    @property
    def shards(self) -> list[Shard]:
        return [self._shard(number) for number in range(len(self.first) - 1)]

    def _shard(self, number: int) -> Shard:
        if number not in self._opened:
            shard = self._open_shard(number)
            n_rows = int(self.first[number + 1] - self.first[number])
            kinds = {key: Kind(shard.dtypes[key], shard.extents[key].shape[1]) for key in shard.keys}
            if shard.n_rows != n_rows or kinds != self.kinds:
                raise _other(shard.path)
            self._opened[number] = shard
        return self._opened[number]

    def _with(self, number: int, key: str) -> Shard | OneSite:
        """The shard, or the one site of it that was asked for until now."""
        kind = self.kinds[key]
        if number in self._opened or self._open_site is None or kind.dtype == torch.int8:
            return self._shard(number)
        if number not in self._sites:
            site = self._open_site(number, key)
            if not site.has_trailer:  # its structure is not what we wrote: look at all of it
                return self._shard(number)
            n_rows = int(self.first[number + 1] - self.first[number])
            if site.extent.shape != (n_rows, kind.width) or site.dtype != kind.dtype:
                raise _other(site.path)
            self._sites[number] = site
        site = self._sites[number]
        return site if site.key == key else self._shard(number)

    def read(self, key: str, ranges: Array | Sequence[tuple[int, int]]) -> Tensor:
        """Rows of a site, one half-open range after the other: [n, width]."""
        return from_bits(self._read_bits(key, ranges), self.kinds[key].read_as)

    def scales(self, key: str, ranges: Array) -> Tensor:
        """What one step of each number of int8 rows stands for, one range after the other: [n, width], float32."""
        found = [self._shard(number).read_scales(key, local) for number, local in self._split(ranges)]
        return torch.from_numpy(np.concatenate([np.empty((0, self.kinds[key].width), np.float32), *found]))

    def _read_bits(self, key: str, ranges: Array | Sequence[tuple[int, int]]) -> Array:
        kind = self.kinds[key]
        wanted = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        n_rows = int((wanted[:, 1] - wanted[:, 0]).sum())
        parts = [(self._with(number, key), local) for number, local in self._split(wanted)]  # each has rows so wide
        out = np.empty((n_rows, kind.width), bits_type(kind.read_as))
        at = 0
        for shard, local in parts:
            n_here = int((local[:, 1] - local[:, 0]).sum())
            shard.read_into(key, local, out[at : at + n_here])
            at += n_here
        return out

    def _split(self, ranges: Array) -> Iterator[tuple[int, Array]]:
        """(shard, its own ranges), where one follows the other in the same shard together."""
        ranges = ranges[ranges[:, 1] > ranges[:, 0]]
        begins = np.searchsorted(self.first, ranges[:, 0], side="right") - 1
        ends = np.searchsorted(self.first, ranges[:, 1] - 1, side="right") - 1
        if np.any(begins != ends):  # some lie across shards
            yield from self._split(self._cut_at_borders(ranges))
            return
        for part in np.split(np.arange(len(ranges)), np.flatnonzero(np.diff(begins)) + 1):
            if len(part):
                number = int(begins[part[0]])
                yield number, ranges[part] - self.first[number]

    def _cut_at_borders(self, ranges: Array) -> Array:
        """The same rows as ranges none of which lies across two shards."""
        borders = self.first[1:-1]
        slabs: list[tuple[int, int]] = []
        for start, stop in ranges:
            inside = borders[(borders > start) & (borders < stop)]
            slabs += itertools.pairwise([start, *inside, stop])
        return np.array(slabs, dtype=np.int64).reshape(-1, 2)

    def non_finite_rows(self, key: str) -> Array:
        """[n_rows], bool: the rows that hold infinite numbers or NaN."""
        step = max(1, _STEP_BYTES // (4 * self.kinds[key].width))
        ranges = [(at, min(at + step, self.n_rows)) for at in range(0, self.n_rows, step)]
        found = [~self.read(key, [each]).isfinite().all(dim=1).numpy() for each in ranges]
        return np.concatenate([np.zeros(0, dtype=bool), *found])

    def take(self, key: str, rows: Array) -> Tensor:
        """Rows of a site by their numbers, in any order: [n, width]. The files are read in their own order."""
        distinct, inverse = np.unique(rows, return_inverse=True)
        found = self._read_bits(key, ranges_of(distinct))
        if len(distinct) != len(rows) or np.any(inverse != np.arange(len(rows))):
            found = found[inverse]  # by numpy: torch would wake all its threads for a few rows
        return from_bits(found, self.kinds[key].read_as)

    def activation(self, key: str) -> Activation:
        """All rows of a site as they are stored."""
        kind = self.kinds[key]
        scales = partial(self._raw, "scales", key) if kind.dtype == torch.int8 else None
        return Activation(kind.dtype, kind.width, partial(self._raw, "extents", key), scales)

    def _raw(self, which: str, key: str) -> Iterator[Array]:
        for shard in self.shards:
            yield from shard.slabs(getattr(shard, which)[key])


class RowArray:
    """Rows of one site as an array-like [n_rows, width]: `rows[3]`, `rows[10:20]`, `rows[[5, 2]]`, `len(rows)`.

    What is asked for is read from the disk, as a torch tensor in its own dtype.
    """

    def __init__(self, store: ShardedRows, key: str, numbers: Array, token_ids: Any, positions: Any) -> None:
        self._store, self._key, self._numbers = store, key, numbers
        self._token_ids, self._positions = token_ids, positions

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._numbers), self._store.kinds[self._key].width

    @property
    def dtype(self) -> torch.dtype:
        return self._store.kinds[self._key].read_as

    @property
    def token_ids(self) -> Array:
        """[n_rows], the token that was fed at each."""
        found: Array = self._token_ids[self._numbers]
        return found

    @property
    def positions(self) -> Array:
        """[n_rows], the place of each in its sequence."""
        found: Array = self._positions[self._numbers]
        return found

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: int | slice | Sequence[int] | Array | Tensor) -> Tensor:
        if not isinstance(at, slice):
            at = np.asarray(at)
            if at.ndim == 0:
                number = int(self._numbers[int(at)])
                return self._store.read(self._key, [(number, number + 1)])[0]
            if at.ndim > 1:
                raise IndexError(f"rows are numbered by one list; found indices of shape {at.shape}.")
            at = at if at.size else np.arange(0)
        numbers = self._numbers[at]
        if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and np.all(np.diff(numbers) == 1):
            return self._store.read(self._key, [(int(numbers[0]), int(numbers[-1]) + 1)])
        return self._store.take(self._key, numbers)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All of them as numpy; bfloat16, which numpy lacks, as float32."""
        whole = self[:]
        found: Array = (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy()
        return found if dtype is None else found.astype(dtype)

    def __repr__(self) -> str:
        return f"<Rows of {self._key}: {self.shape[0]} x {self.shape[1]}, {str(self.dtype).removeprefix('torch.')}>"


class RowsDataset(Dataset[Any]):
    """Rows as a torch Dataset, with labels or without. It holds no open file, so that workers may share it."""

    def __init__(self, rows: RowArray, labels: Sequence[Any] | None) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        return row if self.labels is None else (row, self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A batch at once, which a DataLoader asks for: one sweep over the files."""
        rows = self.rows[indices]
        return (
            list(rows) if self.labels is None else [(row, self.labels[i]) for row, i in zip(rows, indices, strict=True)]
        )

"""The rows of all shards of a run as one long array a site, read by number. Knows nothing of samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.errors import StoreError
from AutomaticEval.store.bits import bits, bits_type, from_bits
from AutomaticEval.store.contents.file_contents import Activation, RowFormat
from AutomaticEval.store.disk.in_threads import in_threads, n_threads_for
from AutomaticEval.store.hdf5.blocks import THREAD_BYTES
from AutomaticEval.store.hdf5.open import OneSite
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.ragged import Array, ranges_of

_STEP_BYTES = 8 * 2**20


class ShardedRows:
    """The rows of all shards of a run, numbered over the run. A shard is opened and checked when it is first read.

    formats: site -> how its rows are stored. first: [n_shards + 1], the number of each shard's first row. open_shard: number -> the
    checked shard. open_site: number and site -> that site alone, which is quicker where no other is asked for.
    """

    def __init__(
        self,
        formats: Mapping[str, RowFormat],
        first: Array,
        open_shard: Callable[[int], Shard],
        open_site: Callable[[int, str], OneSite] | None = None,
    ) -> None:
        self.formats, self.first, self._open_shard, self._open_site = dict(formats), first, open_shard, open_site
        self._opened: dict[int, Shard] = {}
        self._sites: dict[int, OneSite] = {}

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> ShardedRows:
        """The rows of shards that are open already."""
        first = np.cumsum([0, *(shard.n_rows for shard in shards)])
        return cls(shards[0].row_formats, first, list(shards).__getitem__)

    @property
    def keys(self) -> list[str]:
        return list(self.formats)

    @property
    def n_rows(self) -> int:
        return int(self.first[-1])

    @property
    def shards(self) -> list[Shard]:
        return [self._shard(number) for number in range(len(self.first) - 1)]

    def _shard(self, number: int) -> Shard:
        if number not in self._opened:
            shard = self._open_shard(number)
            if shard.n_rows != self._n_rows_of(number) or shard.row_formats != self.formats:
                raise _other_rows(shard.path)
            self._opened[number] = shard
        return self._opened[number]

    def _n_rows_of(self, number: int) -> int:
        return int(self.first[number + 1] - self.first[number])

    def _with(self, number: int, key: str) -> Shard | OneSite:
        """A shard, or one site of it as long as no other site was asked for."""
        row_format = self.formats[key]
        if number in self._opened or self._open_site is None or row_format.dtype == torch.int8:
            return self._shard(number)
        if number not in self._sites:
            site = self._open_site(number, key)
            if not site.has_trailer:  # its structure is not what we wrote: look at all of it
                return self._shard(number)
            if site.extent.shape != (self._n_rows_of(number), row_format.width) or site.dtype != row_format.dtype:
                raise _other_rows(site.path)
            self._sites[number] = site
        site = self._sites[number]
        return site if site.key == key else self._shard(number)

    def read(self, key: str, ranges: Array | Sequence[tuple[int, int]], out: Tensor | None = None) -> Tensor:
        """Rows of a site, one half-open range after the other: [n, width]. out: what they are read into; None makes it."""
        return from_bits(self._read_bits(key, ranges, out), self.formats[key].read_as)

    def scales(self, key: str, ranges: Array) -> Tensor:
        """For int8 rows, one range after the other: by how much a number grows when its stored integer grows by one. [n, width], float32."""
        none = np.empty((0, self.formats[key].width), np.float32)
        scales = [self._shard(number).read_scales(key, local) for number, local in self._split(ranges)]
        return torch.from_numpy(np.concatenate([none, *scales]))

    def _read_bits(self, key: str, ranges: Array | Sequence[tuple[int, int]], into: Tensor | None = None) -> Array:
        row_format = self.formats[key]
        wanted = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        n_rows = int((wanted[:, 1] - wanted[:, 0]).sum())
        # each shard is checked to have rows of this width before memory is taken for them
        by_shard = [(self._with(number, key), local) for number, local in self._split(wanted)]
        out = np.empty((n_rows, row_format.width), bits_type(row_format.read_as)) if into is None else bits(into)
        ends = np.cumsum([0, *(int((local[:, 1] - local[:, 0]).sum()) for _, local in by_shard)]).tolist()

        def read(number: int) -> None:
            shard, local = by_shard[number]
            shard.read_into(key, local, out[ends[number] : ends[number + 1]])

        n_threads = n_threads_for(out.nbytes, THREAD_BYTES) if len(by_shard) > 1 else 1
        in_threads(read, range(len(by_shard)), n_threads)
        return out

    def _split(self, ranges: Array) -> Iterator[tuple[int, Array]]:
        """(shard, its own ranges). Ranges that follow one another in the same shard are together."""
        ranges = ranges[ranges[:, 1] > ranges[:, 0]]
        begins = np.searchsorted(self.first, ranges[:, 0], side="right") - 1
        ends = np.searchsorted(self.first, ranges[:, 1] - 1, side="right") - 1
        if np.any(begins != ends):  # some lie across shards
            yield from self._split(self._cut_at_borders(ranges))
            return
        for together in np.split(np.arange(len(ranges)), np.flatnonzero(np.diff(begins)) + 1):
            if len(together):
                number = int(begins[together[0]])
                yield number, ranges[together] - self.first[number]

    def _cut_at_borders(self, ranges: Array) -> Array:
        """Ranges of the same rows, of which none lies across two shards."""
        borders = self.first[1:-1]
        cut: list[tuple[int, int]] = []
        for start, stop in ranges:
            inside = borders[(borders > start) & (borders < stop)]
            cut += itertools.pairwise([start, *inside, stop])
        return np.array(cut, dtype=np.int64).reshape(-1, 2)

    def non_finite_rows(self, key: str) -> Array:
        """[n_rows], bool: the rows that hold infinite numbers or NaN."""
        step = max(1, _STEP_BYTES // (4 * self.formats[key].width))
        ranges = [(at, min(at + step, self.n_rows)) for at in range(0, self.n_rows, step)]
        wrong = [~self.read(key, [each]).isfinite().all(dim=1).numpy() for each in ranges]
        return np.concatenate([np.zeros(0, dtype=bool), *wrong])

    def take(self, key: str, rows: Array) -> Tensor:
        """Rows of a site by their numbers, in any order: [n, width]. The files are read in their own order."""
        if np.all(rows[1:] > rows[:-1]):
            return self.read(key, ranges_of(rows))
        distinct, inverse = np.unique(rows, return_inverse=True)
        raw = self._read_bits(key, ranges_of(distinct))
        if len(distinct) != len(rows) or np.any(inverse != np.arange(len(rows))):
            raw = raw[inverse]  # by numpy: torch would wake all its threads for a few rows
        return from_bits(raw, self.formats[key].read_as)

    def activation(self, key: str) -> Activation:
        """All rows of a site as they are stored."""
        row_format = self.formats[key]
        scales = partial(self._scale_slabs, key) if row_format.dtype == torch.int8 else None
        return Activation(row_format.dtype, row_format.width, partial(self._row_slabs, key), scales)

    def _row_slabs(self, key: str) -> Iterator[Array]:
        for shard in self.shards:
            yield from shard.slabs(shard.extents[key])

    def _scale_slabs(self, key: str) -> Iterator[Array]:
        for shard in self.shards:
            yield from shard.slabs(shard.scales[key])


def _other_rows(path: Path) -> StoreError:
    return StoreError(f"{path} has not the rows and sites of its run; restore it from a copy.")

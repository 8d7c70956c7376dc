"""Reads rows of a dataset from the file, and checks each block of rows against its checksum.

A contiguous dataset is read with `pread` at the offset that HDF5 gives. This needs neither HDF5 nor its lock, so it is quick, and
works in threads and forked workers. A compressed dataset is read through HDF5. A block is read whole, also for one of its rows,
and hashed while it is in the processor's cache.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import xxhash

from AutomaticEval.errors import DamagedFile, StoreError
from AutomaticEval.store.bits import raw_bytes
from AutomaticEval.store.disk.in_threads import in_threads, n_threads_for
from AutomaticEval.store.hdf5.attributes import attribute_of, text_of
from AutomaticEval.store.hdf5.checksums import NAME, rows_per_block
from AutomaticEval.store.hdf5.extents import BlockSums, Extent, dataset_of, naming, needs_filters, offset_of, stamp_of
from AutomaticEval.store.hdf5.trailer import CHECKSUMS
from AutomaticEval.store.ragged import Array, ranges_of

_STEP_BYTES = 2**21
"""So many bytes are read at once: they are still in the processor's cache when they are hashed."""

THREAD_BYTES = 2**23
"""The bytes that one thread reads and checks before another is worth its start."""

Fetch = Callable[[int, int, Array], None]
"""Called with start, stop and an array of stop - start rows, into which it reads them."""


class FileArray:
    """A dataset of a file that is sliced like an array. A slice reads only the blocks that it needs."""

    def __init__(self, path: Path, extent: Extent) -> None:
        self._path, self._extent = path, extent

    def __len__(self) -> int:
        return self._extent.shape[0]

    def __getitem__(self, at: slice | Array) -> Array:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1
            return read_ranges(self._path, self._extent, [(start, max(start, stop))])
        return read_ranges(self._path, self._extent, ranges_of(at))


def read_ranges(
    path: Path, extent: Extent, ranges: Array | Sequence[tuple[int, int]], out: Array | None = None
) -> Array:
    """Rows of a dataset, one half-open range after the other: [n, ...].

    out: the array to read into; None makes one. Raises TruncatedFile when the file ends before the rows, DamagedFile when they do not fit
    their checksums, and StoreError when the file is another one than the extent was taken from.
    """
    wanted = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
    if out is None:
        out = np.empty((int((wanted[:, 1] - wanted[:, 0]).sum()), *extent.shape[1:]), extent.dtype)
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            if stamp_of(os.fstat(handle)) != extent.stamp:
                raise StoreError(f"{path} was replaced or changed since it was opened; open it again.")
            if extent.offset is None:
                with h5py.File(path, "r") as file:
                    needs_filters(path, file[extent.name])
                    _read(path, extent, handle, partial(_fetch_chunks, file[extent.name]), wanted, out)
            else:
                _read(path, extent, handle, partial(_fetch, handle, extent), wanted, out)
        finally:
            os.close(handle)
    return out


def sums_of(file: h5py.File, dataset: h5py.Dataset, extent: Extent, version: tuple[int, ...]) -> BlockSums | None:
    """Where the checksums of a dataset's blocks are; None for a dataset without checksums.

    version: of the file's format. Raises ValueError when there are not as many as the dataset has blocks.
    """
    if not math.prod(extent.shape) or version < (1, 1):
        return None
    n_rows = extent.shape[0]
    rows = dataset.chunks[0] if dataset.chunks else rows_per_block(extent.row_bytes)
    if n_rows > rows and version >= (1, 2):
        return BlockSums(rows, _offset_of_sums(file, extent.name, rows, -(-n_rows // rows)))
    try:
        single = text_of(dataset, NAME)
    except KeyError:
        raise ValueError(f"/{extent.name} has no checksum") from None
    return BlockSums(n_rows, None, int(single, 16), only_whole=n_rows > rows)


def _offset_of_sums(file: h5py.File, name: str, rows: int, n_blocks: int) -> int:
    stored = dataset_of(file, f"{CHECKSUMS}/{name}")
    if stored.shape != (n_blocks,) or stored.dtype != np.dtype("<u8") or attribute_of(stored, "rows") != rows:
        raise ValueError(f"/{CHECKSUMS}/{name} are not the {n_blocks} checksums of blocks of {rows} rows")
    return offset_of(stored, stored.name.strip("/"), 8 * n_blocks, file.id.get_filesize())


def stored_sums(path: Path, extent: Extent) -> Array | None:
    """[n_blocks], uint64: the checksums of a dataset's blocks. None where it has one block or none."""
    if extent.sums is None or extent.sums.offset is None:
        return None
    n_blocks = -(-extent.shape[0] // extent.sums.rows)
    checksums = Extent("checksums", extent.sums.offset, (n_blocks,), np.dtype("<u8"), extent.stamp)
    return read_ranges(path, checksums, [(0, n_blocks)])


def damaged(path: Path, name: str, start: int, stop: int) -> DamagedFile:
    """The error for rows of a dataset that do not fit their checksum."""
    return DamagedFile(
        f"{path}: /{name} is not what its checksum says in the rows {start} to {stop - 1}. Restore the file from a copy, or "
        "capture again (--resume does of a run that was cut short); the other rows and files can be read."
    )


def _read(path: Path, extent: Extent, handle: int, fetch: Fetch, wanted: Array, out: Array) -> None:
    _Blocks(path, extent, handle, fetch).read(wanted, out)
    sums = extent.sums
    if sums is None or not sums.only_whole or not _is_whole(wanted, sums.rows):
        return
    if xxhash.xxh3_64_intdigest(raw_bytes(out)) != sums.single:
        raise damaged(path, extent.name, 0, sums.rows)


def _is_whole(wanted: Array, n_rows: int) -> bool:
    """Whether the ranges are all n_rows rows, in order."""
    edges = wanted.reshape(-1)
    return bool(len(edges)) and edges[0] == 0 and edges[-1] == n_rows and bool(np.all(edges[1:-1:2] == edges[2::2]))


class _Blocks:
    """The blocks of a dataset, which are read and checked within one call. Without checksums, each row is a block."""

    def __init__(self, path: Path, extent: Extent, handle: int, fetch: Fetch) -> None:
        self._path, self._extent, self._handle, self._fetch = path, extent, handle, fetch
        self._sums = None if extent.sums is None or extent.sums.only_whole else extent.sums
        self._rows, self._n_rows = 1 if self._sums is None else self._sums.rows, extent.shape[0]
        self._held = np.empty((0, *extent.shape[1:]), extent.dtype)
        self._first = self._stop = 0
        """The first row of the block that is held, and the row after its last row."""

    def read(self, wanted: Array, out: Array) -> None:
        """Read ranges of rows into out.

        Whole blocks are read straight into out. A block of which only some rows are wanted is read into memory, and held for the next range.
        """
        rows, filled = self._rows, 0
        for start, stop in wanted.tolist():
            while start < stop:
                if self._first <= start < self._stop:
                    end = min(stop, self._stop)
                    out[filled : filled + end - start] = self._held[start - self._first : end - self._first]
                elif start % rows == 0 and stop >= min(start + rows, self._n_rows):
                    end = stop if stop == self._n_rows else stop - stop % rows
                    self._whole(start, end, out[filled : filled + end - start])
                else:
                    self._hold(start // rows)
                    continue
                filled, start = filled + end - start, end

    def _hold(self, number: int) -> None:
        start, stop = number * self._rows, min((number + 1) * self._rows, self._n_rows)
        if not len(self._held):
            self._held = np.empty((min(self._rows, self._n_rows), *self._extent.shape[1:]), self._extent.dtype)
        self._first = self._stop = 0
        self._whole(start, stop, self._held[: stop - start])
        self._first, self._stop = start, stop

    def _whole(self, start: int, stop: int, out: Array) -> None:
        """Read and check whole blocks. start: the first row of a block. stop: the row after the last row of a block."""
        sums = self._sums
        if sums is None:
            self._fetch(start, stop, out)
            return
        view, rows, block_bytes = raw_bytes(out), sums.rows, sums.rows * self._extent.row_bytes
        expected = self._expected(sums, start // rows, -(-(stop - start) // rows))
        together = max(1, _STEP_BYTES // block_bytes)

        def read(first: int) -> None:
            at = start + first * rows
            end = min(at + together * rows, stop)
            self._fetch(at, end, out[at - start : end - start])
            for number in range(first, min(first + together, len(expected))):
                block = view[number * block_bytes : (number + 1) * block_bytes]
                if xxhash.xxh3_64_intdigest(block) != expected[number]:
                    wrong = start + number * rows
                    raise damaged(self._path, self._extent.name, wrong, min(wrong + rows, self._n_rows))

        if len(expected) <= together:  # as for a random row
            read(0)
            return
        # HDF5, which reads what is compressed, lets no two threads in
        n_threads = 1 if self._extent.offset is None else n_threads_for(out.nbytes, THREAD_BYTES)
        in_threads(read, range(0, len(expected), together), n_threads)

    def _expected(self, sums: BlockSums, first: int, n_blocks: int) -> Sequence[int]:
        if sums.offset is None:
            return (sums.single,)
        raw = os.pread(self._handle, 8 * n_blocks, sums.offset + 8 * first)
        if len(raw) < 8 * n_blocks:
            raise OSError(f"the checksums of {self._extent.name} end too soon")
        return struct.unpack(f"<{n_blocks}Q", raw)


def _fetch(handle: int, extent: Extent, start: int, stop: int, out: Array) -> None:
    assert extent.offset is not None
    view, filled = raw_bytes(out), 0
    at = extent.offset + start * extent.row_bytes
    while filled < len(view):
        got = os.preadv(handle, [view[filled:]], at + filled)
        if not got:
            raise OSError(f"{extent.name} ends before row {stop}")
        filled += got


def _fetch_chunks(dataset: h5py.Dataset, start: int, stop: int, out: Array) -> None:
    space = dataset.id.get_space()
    space.select_hyperslab((start, 0), out.shape)
    there = h5py.h5s.create_simple(out.shape)
    dataset.id.read(there, space, out, mtype=dataset.id.get_type())  # raw bits: no conversion

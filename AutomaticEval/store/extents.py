"""Where the numbers of a dataset lie in its file, and reading them there.

Contiguous datasets are read with `pread` at the offset that HDF5 gives, which needs neither HDF5 nor its lock: it is quick,
and works in threads and forked workers. What is compressed is read through HDF5. Nothing is believed that the file does not
bear out: links that lead elsewhere and sizes larger than the file are refused.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from AutomaticEval.errors import MissingFilter, StoreError, TruncatedFile
from AutomaticEval.store import format as contract
from AutomaticEval.store.ragged import Array, ranges_of

_MAX_CHUNK_BYTES = 16 * 2**20
_TEXT_BYTES = 16
"""Of a variable-length value in its dataset: length, address and index of the heap that holds it."""
_REFUSED = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ESTALE)
_DAMAGED = "{} cannot be read ({}): it is damaged; capture it again or restore a copy."
_FILTERS = {32015: "zstd", 32004: "lz4"}


class Extent(NamedTuple):
    """Where the numbers of a contiguous dataset lie in its file; an offset of None: in chunks."""

    name: str
    offset: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stamp: tuple[int, ...]
    """Of the file when it was opened: another file of the same name is not read in its place."""

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class FileArray:
    """A dataset of a file, sliced like an array; a slice reads its own bytes."""

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


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_ranges(
    path: Path, extent: Extent, ranges: Array | Sequence[tuple[int, int]], out: Array | None = None
) -> Array:
    """Rows of a dataset, one range after the other. Raises TruncatedFile when the file ends before them."""
    if out is None:
        out = np.empty((sum(int(stop - start) for start, stop in ranges), *extent.shape[1:]), extent.dtype)
    with naming(path):
        if extent.offset is None:
            _read_chunked(path, extent, ranges, out)
        else:
            _read_contiguous(path, extent, ranges, out)
    return out


def _read_contiguous(path: Path, extent: Extent, ranges: Array | Sequence[tuple[int, int]], out: Array) -> None:
    assert extent.offset is not None
    handle = os.open(path, os.O_RDONLY)
    try:
        if stamp_of(os.fstat(handle)) != extent.stamp:
            raise StoreError(f"{path} was replaced or changed since it was opened; open it again.")
        view, filled = contract.raw_bytes(out), 0
        for start, stop in np.asarray(ranges).tolist():
            at, end = extent.offset + start * extent.row_bytes, filled + (stop - start) * extent.row_bytes
            while filled < end:
                got = os.preadv(handle, [view[filled:end]], at)
                if not got:
                    raise OSError(f"{extent.name} ends before row {stop}")
                filled, at = filled + got, at + got
    finally:
        os.close(handle)


def _read_chunked(path: Path, extent: Extent, ranges: Array | Sequence[tuple[int, int]], out: Array) -> None:
    with h5py.File(path, "r") as file:
        dataset, filled = file[extent.name], 0
        _needs_filters(path, dataset)
        space, stored = dataset.id.get_space(), dataset.id.get_type()
        for start, stop in np.asarray(ranges).tolist():
            part = out[filled : filled + stop - start]
            space.select_hyperslab((start, 0), part.shape)
            dataset.id.read(h5py.h5s.create_simple(part.shape), space, part, mtype=stored)  # raw bits: no conversion
            filled += stop - start


def _needs_filters(path: Path, dataset: h5py.Dataset) -> None:
    """Raises MissingFilter when HDF5 lacks what the dataset was compressed with."""
    settings = dataset.id.get_create_plist()
    codes = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    for code in codes:
        if code in _FILTERS and not h5py.h5z.filter_avail(code):
            load_filters(path, _FILTERS[code])


def load_filters(what: Path | str, name: str) -> Any:
    """hdf5plugin, which registers its filters with HDF5. Raises MissingFilter without it."""
    try:
        import hdf5plugin
    except ImportError:
        raise MissingFilter(
            f"{what}: {name} compression needs hdf5plugin; pip install 'AutomaticEval[compression]', or use gzip."
        ) from None
    return hdf5plugin


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What damage raises inside carries the file. A mistake of our own stays what it is: it is in no frame of h5py's."""
    try:
        yield
    except OSError as failure:
        if failure.errno in _REFUSED:
            raise StoreError(f"{path} cannot be opened: {os.strerror(failure.errno)}.") from failure
        raise TruncatedFile(_DAMAGED.format(path, failure)) from failure
    except (KeyError, ValueError, RuntimeError, MemoryError) as failure:
        raise TruncatedFile(_DAMAGED.format(path, failure)) from failure
    except (TypeError, AttributeError, IndexError) as failure:
        if not _is_of_hdf5(failure):
            raise
        raise TruncatedFile(_DAMAGED.format(path, failure)) from failure


def _is_of_hdf5(failure: BaseException) -> bool:
    """Whether it was raised in h5py, which says so of types that it does not know."""
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == "h5py"


def group_of(file: h5py.File, name: str) -> h5py.Group:
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Group):
        raise ValueError(f"/{name} is not a group of this file")
    return file[name]


def dataset_of(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose numbers are in this very file."""
    folder, _, own = name.rpartition("/")
    group = group_of(file, folder)
    if not isinstance(group.get(own, getlink=True), h5py.HardLink) or not isinstance(group[own], h5py.Dataset):
        raise ValueError(f"/{name} is not a dataset of this file")
    dataset = group[own]
    if dataset.external:
        raise ValueError(f"/{name} has its numbers in another file")
    return dataset


def extent_of(file: h5py.File, name: str, status: os.stat_result, dtype: Any, *, chunks: bool = False) -> Extent:
    """Where a dataset's numbers lie. Raises ValueError when they are not all in the file, as wide as expected."""
    dataset = dataset_of(file, name)
    expected, size, stamp = np.dtype(dtype), status.st_size, stamp_of(status)
    if dataset.id.get_type().get_size() != expected.itemsize or (
        expected.kind in "if" and not _alike(dataset, expected)
    ):
        raise ValueError(f"/{name} is {dataset.dtype}, expected {expected}")
    n_bytes = math.prod(dataset.shape) * expected.itemsize
    if not n_bytes:
        return Extent(name, 0, dataset.shape, expected, stamp)
    if dataset.chunks is not None and chunks:
        _check_chunks(dataset, name, expected.itemsize)
        return Extent(name, None, dataset.shape, expected, stamp)
    offset = dataset.id.get_offset()
    if offset is None or dataset.is_virtual or dataset.id.get_storage_size() != n_bytes or offset + n_bytes > size:
        raise ValueError(f"/{name} says {n_bytes} bytes, which are not in the file of {size}")
    return Extent(name, int(offset), dataset.shape, expected, stamp)


def _alike(dataset: h5py.Dataset, expected: np.dtype[Any]) -> bool:
    """Whether numbers are of the type that is expected; an activation's own type was compared before."""
    return dataset.name.startswith("/activations/") or bool(dataset.dtype == expected)


def _check_chunks(dataset: h5py.Dataset, name: str, item_bytes: int) -> None:
    n_chunks = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    chunk_bytes = math.prod(dataset.chunks) * item_bytes
    if chunk_bytes > _MAX_CHUNK_BYTES or dataset.id.get_num_chunks() != n_chunks:
        raise ValueError(
            f"/{name} has {dataset.id.get_num_chunks()} chunks of {chunk_bytes} bytes, expected {n_chunks}"
        )


def check_column(file: h5py.File, name: str, n_values: int, size: int) -> None:
    """Raises ValueError when a column does not have one value a sample, all of them in the file."""
    dataset = dataset_of(file, name)
    if dataset.shape != (n_values,):
        raise ValueError(f"/{name} has shape {dataset.shape}, expected [{n_values}]")
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    n_bytes = n_values * (_TEXT_BYTES if is_text else dataset.id.get_type().get_size())
    if "encoding" not in dataset.attrs or dataset.attrs["encoding"] not in contract.ENCODINGS:
        raise ValueError(f"/{name} has the encoding {dataset.attrs.get('encoding')!r}")
    if n_bytes and (dataset.chunks is not None or dataset.id.get_storage_size() != n_bytes or n_bytes > size):
        raise ValueError(f"/{name} says {n_bytes} bytes, which are not in the file of {size}")

"""Finds where the numbers of a dataset lie in its file.

The file may be damaged or made to do harm: links that lead out of it, and sizes larger than the file, are refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from AutomaticEval.errors import FileRefused, MissingFilter, TruncatedFile
from AutomaticEval.samples import COLUMNS
from AutomaticEval.store.disk.system import UNREAD, code_of
from AutomaticEval.store.hdf5.attributes import text_of
from AutomaticEval.store.hdf5.column_codec import ENCODED, ENCODINGS, NUMPY
from AutomaticEval.store.hdf5.contract import holds_sites
from AutomaticEval.store.hdf5.room import REFERENCE, Room, text_bytes

_MAX_CHUNK_BYTES = 16 * 2**20
_DAMAGED = "{} cannot be read ({}): it is damaged; capture it again or restore a copy."
_FILTERS = {32015: "zstd", 32004: "lz4"}
_MADE_BY = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, *_FILTERS}
_ENTRY_BYTES = 40
"""A group takes at least so many bytes for each of its members."""


class BlockSums(NamedTuple):
    """Where the checksums of a dataset's blocks of rows are, against which its reads are checked."""

    rows: int
    """Number of rows in a block. The last block may have fewer."""

    offset: int | None
    """Where the checksums lie in the file, 8 bytes each. None: there is one block, and single is its checksum."""

    single: int = 0

    only_whole: bool = False
    """Whether the one block is large, as in files of 1.1: it is checked only when all of it is read."""


class Extent(NamedTuple):
    """Where the numbers of a dataset lie in its file."""

    name: str
    offset: int | None
    """Where the first byte of a contiguous dataset is. None: the dataset is in chunks, and is read through HDF5."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stamp: tuple[int, ...]
    """Device, inode, size and time of the file when it was opened, so that another file with the same name is not taken for it."""

    sums: BlockSums | None = None
    """None: reads are not checked."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What identifies the file that was opened, as `Extent.stamp`."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def needs_filters(path: Path, dataset: h5py.Dataset) -> None:
    """Have HDF5 know the filters that a dataset was compressed with. Raises MissingFilter when their library is not installed."""
    settings = dataset.id.get_create_plist()
    codes = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    for code in codes:
        if code in _FILTERS and not h5py.h5z.filter_avail(code):
            load_filters(path, _FILTERS[code])


def load_filters(what: Path | str, name: str) -> Any:
    """Import hdf5plugin, which registers its filters with HDF5. Raises MissingFilter when it is not installed.

    what: the file or option that the message names. name: of the compression.
    """
    try:
        import hdf5plugin
    except ImportError:
        raise MissingFilter(
            f"{what}: {name} compression needs hdf5plugin; pip install 'AutomaticEval[compression]', or use gzip."
        ) from None
    return hdf5plugin


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise what a damaged or unreadable file causes inside the with as TruncatedFile or FileRefused, with the file's path.

    A TypeError and the like is taken for damage only when h5py raised it. One of our own code is a mistake, and stays as it is.
    """
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError, MemoryError, ArithmeticError) as failure:
        code = code_of(failure)
        if code in UNREAD:
            raise FileRefused(f"{path} cannot be read: {os.strerror(code)}.") from failure
        raise TruncatedFile(_DAMAGED.format(path, failure)) from failure
    except (TypeError, AttributeError, IndexError) as failure:
        if not _is_of_hdf5(failure):
            raise
        raise TruncatedFile(_DAMAGED.format(path, failure)) from failure


def _is_of_hdf5(failure: BaseException) -> bool:
    """Whether an exception was raised in h5py, which raises a TypeError for types that it does not know."""
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == "h5py"


def group_of(file: h5py.File, name: str) -> h5py.Group:
    """A group of this very file. Raises ValueError for anything else."""
    group = _object_of(file, name)
    if not isinstance(group, h5py.h5g.GroupID):
        raise ValueError(f"/{name} is not a group of this file")
    return h5py.Group(group)


def _object_of(file: h5py.File, name: str) -> Any:
    """The object of a file with a name; None where there is none, or a link that leads elsewhere.

    Calls HDF5 directly: h5py asks it a dozen questions for each object, and a run has thousands of datasets.
    """
    item = h5py.h5g.open(file.id, b"/")
    for each in filter(None, name.split("/")):
        own_name = each.encode("utf-8", "surrogateescape")
        if not isinstance(item, h5py.h5g.GroupID) or not item.links.exists(own_name):
            return None
        if item.links.get_info(own_name).type != h5py.h5l.TYPE_HARD:
            return None
        item = h5py.h5o.open(item, own_name)
    return item


def names_of(file: h5py.File, name: str) -> list[str]:
    """The names of a group's members. Raises ValueError for a name that could lead out of the group."""
    group = group_of(file, name)
    if _ENTRY_BYTES * len(group) > file.id.get_filesize():
        raise ValueError(f"/{name} says that it has {len(group)} members, in a file of {file.id.get_filesize()} bytes")
    names = list(group)
    for each in names:
        if not isinstance(each, str) or "/" in each or each in ("", ".", ".."):
            raise ValueError(f"/{name} has a member of the name {each!r}")
    return names


def dataset_of(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose numbers are in this very file. Raises ValueError for anything else."""
    dataset = _object_of(file, name)
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise ValueError(f"/{name} is not a dataset of this file")
    if dataset.get_create_plist().get_external_count():
        raise ValueError(f"/{name} has its numbers in another file")
    if dataset.get_space().get_simple_extent_type() == h5py.h5s.NULL:
        raise ValueError(f"/{name} has no shape")
    return h5py.Dataset(dataset)


def extent_of(
    dataset: h5py.Dataset, name: str, status: os.stat_result, dtype: Any, room: Room, n_dimensions: int = 1
) -> Extent:
    """Where a dataset's numbers lie.

    status: of the file. dtype: that the numbers must have. room: what the file can still hold, from which the dataset is taken.
    Raises ValueError when the numbers are of another dtype or number of dimensions, or not all in the file.
    """
    expected, stamp = np.dtype(dtype), stamp_of(status)
    if dataset.id.get_type().get_size() != expected.itemsize or (
        expected.kind in "if" and not _alike(dataset, name, expected)
    ):
        raise ValueError(f"/{name} is {dataset.dtype}, expected {expected}")
    if dataset.ndim != n_dimensions:
        raise ValueError(f"/{name} has shape {dataset.shape}, expected {n_dimensions} dimensions")
    room.check_shape(name, dataset.shape)
    n_bytes = math.prod(dataset.shape) * expected.itemsize
    if not n_bytes:
        return Extent(name, 0, dataset.shape, expected, stamp)
    if dataset.chunks is not None and holds_sites(name):
        _check_chunks(dataset, name, expected.itemsize)
        room.take_compressed(name, n_bytes)
        return Extent(name, None, dataset.shape, expected, stamp)
    offset = offset_of(dataset, name, n_bytes, status.st_size)
    room.take(name, n_bytes)
    return Extent(name, offset, dataset.shape, expected, stamp)


def offset_of(dataset: h5py.Dataset, name: str, n_bytes: int, size: int) -> int:
    """Where the bytes of a dataset begin. Raises ValueError when they do not follow one another in the file of this size."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.is_virtual or dataset.id.get_storage_size() != n_bytes or offset + n_bytes > size:
        raise ValueError(f"/{name} says {n_bytes} bytes, which are not in the file of {size}")
    return int(offset)


def _alike(dataset: h5py.Dataset, name: str, expected: np.dtype[Any]) -> bool:
    """Whether a dataset has the expected dtype. The type of an activation was compared before."""
    return holds_sites(name) or bool(dataset.dtype == expected)


def _check_chunks(dataset: h5py.Dataset, name: str, item_bytes: int) -> None:
    n_chunks = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    chunk_bytes = math.prod(dataset.chunks) * item_bytes
    if chunk_bytes > _MAX_CHUNK_BYTES or dataset.id.get_num_chunks() != n_chunks:
        raise ValueError(
            f"/{name} has {dataset.id.get_num_chunks()} chunks of {chunk_bytes} bytes, expected {n_chunks}"
        )
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    if not set(filters) <= _MADE_BY or len(set(filters)) < len(filters):
        raise ValueError(
            f"/{name} is compressed with the filters {filters}, of which the format has {sorted(_MADE_BY)}"
        )


def check_column(file: h5py.File, name: str, n_values: int, size: int, room: Room) -> str:
    """Check a column, and return its encoding. size: of the file.

    Raises ValueError when the column does not have n_values values in an encoding of its type, or when they are not all in the file. For
    text every reference is looked at: the texts that the references name must together fit into the file, too.
    """
    dataset = dataset_of(file, name)
    if dataset.shape != (n_values,):
        raise ValueError(f"/{name} has shape {dataset.shape}, expected [{n_values}]")
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    encoding, column = text_of(dataset, "encoding"), name.removeprefix("samples/")
    column_type = COLUMNS.get(column) if column != name else "text"
    allowed = ENCODINGS if column_type is None else ENCODED[column_type]
    if encoding not in allowed or is_text == (encoding in NUMPY):
        raise ValueError(f"/{name} is {dataset.dtype} with the encoding {encoding!r}")
    if is_text and n_values:
        _check_text(file, dataset, name, n_values, size, room)
    return encoding


def _check_text(file: h5py.File, dataset: h5py.Dataset, name: str, n_values: int, size: int, room: Room) -> None:
    """Raises ValueError for text that does not fit into the file, such as thousands of references to one long text."""
    n_bytes = n_values * REFERENCE.itemsize
    offset = offset_of(dataset, name, n_bytes, size)
    if h5py.check_string_dtype(dataset.dtype).length is not None:
        raise ValueError(f"/{name} is text of a fixed length")
    raw = os.pread(file.id.get_vfd_handle(), n_bytes, offset)
    room.take(name, n_bytes + text_bytes(raw))

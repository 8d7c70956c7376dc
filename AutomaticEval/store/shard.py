"""Reads one file: checked when it is opened, never held open, and read at the places where its numbers lie.

Contiguous datasets are read with `pread` at the offset that HDF5 gives, which needs neither HDF5 nor its lock: it is quick,
and works in threads and forked workers. What is compressed is read through HDF5. Nothing is believed that the file does not
bear out: links that lead elsewhere, sizes larger than the file, and ranges outside the rows are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from AutomaticEval.errors import MissingFilter, NewerFormat, NotActivations, StoreError, TruncatedFile
from AutomaticEval.sites import key_order
from AutomaticEval.store import eight_bits
from AutomaticEval.store import format as contract
from AutomaticEval.store.contents import Activation, Array, Contents, Ragged, ranges_of

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PIECE_BYTES = 8 * 2**20
_MAX_CHUNK_BYTES = 16 * 2**20
_TEXT_BYTES = 16
"""Of a variable-length value in its dataset: length, address and index of the heap that holds it."""
_FILTERS = {32015: "zstd", 32004: "lz4"}


class Extent(NamedTuple):
    """Where the numbers of a contiguous dataset lie in its file; an offset of None: in chunks."""

    name: str
    offset: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

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
    """Failures inside carry the file."""
    try:
        yield
    except (OSError, LookupError, ValueError, RuntimeError, AttributeError, TypeError, MemoryError) as failure:
        raise TruncatedFile(
            f"{path} cannot be read ({failure}): it is damaged; capture it again or restore a copy."
        ) from failure


def open_hdf5(path: Path, kind: str) -> h5py.File:
    """Open a file of ours, or say what it is instead. Raises UnreadableFile."""
    if not path.is_file():
        raise StoreError(f"no file {path}.")
    with path.open("rb") as raw:
        head = raw.read(len(_SIGNATURE))
    if head != _SIGNATURE:
        empty = "it is empty" if not head else f"it begins with {head[:8]!r}"
        raise NotActivations(f"{path} is not an HDF5 file ({empty}); activations are saved as .h5.")
    try:
        file = h5py.File(path, "r")
    except OSError as failure:
        raise TruncatedFile(
            f"{path} was cut short or damaged ({failure}); capture it again or restore a copy."
        ) from failure
    try:
        with naming(path):
            attributes = dict(file.attrs)
        _check_version(path, attributes, kind)
    except BaseException:
        file.close()
        raise
    return file


def _check_version(path: Path, attributes: Mapping[str, Any], kind: str) -> None:
    found = attributes.get("format")
    if found != kind:
        raise NotActivations(f"{path} is HDF5, but not ours: its format attribute is {found!r}, expected {kind!r}.")
    version = str(attributes.get("format_version"))
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) > contract.VERSION[0]:
        ours = ".".join(map(str, contract.VERSION))
        raise NewerFormat(
            f"{path} has format version {version}; this version reads up to {ours}. Upgrade AutomaticEval."
        )


class Shard:
    """One file, of either kind: a shard, or the `run.h5` over all shards of a run."""

    def __init__(self, path: Path, kind: str = contract.SHARD_FORMAT) -> None:
        self.path, self.kind = path, kind
        with self.reading() as file:
            self.attributes = {name: str(value) for name, value in file.attrs.items()}
            self.model = self.attributes["model"]
            self.settings: dict[str, Any] = json.loads(self.attributes["settings"])
            self.size_bytes = path.stat().st_size
            known = list(contract.COLUMNS)  # a newer minor version may have more
            self.column_names = sorted(
                _group(file, "samples"), key=lambda name: known.index(name) if name in known else len(known)
            )
            self.has_rows = "rows" in file  # run.h5 of version 1.0 has none
            if self.has_rows:
                self._read_structure(file)

    @contextmanager
    def reading(self) -> Iterator[h5py.File]:
        """The open file; failures carry its path."""
        with open_hdf5(self.path, self.kind) as file, naming(self.path):
            yield file

    def _read_structure(self, file: h5py.File) -> None:
        size = self.size_bytes
        self.keys = sorted(_group(file, "activations"), key=key_order)
        self.numbers = {
            name: _extent(file, name, size, "<i8" if name.endswith(("offset", "start", "stop")) else "<i4")
            for name in _number_names(file)
        }
        self.n_rows = self.numbers["rows/token_id"].shape[0]
        self.scales = {
            key: _extent(file, f"scales/{key}", size, "<f4")
            for key in (_group(file, "scales") if "scales" in file else ())
        }
        self.dtypes: dict[str, torch.dtype] = {}
        self.extents: dict[str, Extent] = {}
        for key in self.keys:
            self.dtypes[key], self.extents[key] = self._activation(file, key)
        self._check_numbers()
        for name in self.column_names:
            _check_text_or_numbers(file, f"samples/{name}", self.n_samples, size)
        _check_text_or_numbers(file, "vocabulary/token", self.numbers["vocabulary/token_id"].shape[0], size)

    def _activation(self, file: h5py.File, key: str) -> tuple[torch.dtype, Extent]:
        name = f"activations/{key}"
        dataset = _dataset(file, name)
        if dataset.ndim != 2 or len(dataset) != self.n_rows:
            raise ValueError(f"/{name} has shape {dataset.shape}, expected [{self.n_rows}, width]")
        dtype = contract.dtype_named(str(dataset.attrs["dtype"]))
        if dataset.id.get_type() != contract.hdf5_type(dtype):
            raise ValueError(f"/{name} is not of the type that its dtype attribute {dtype} says")
        if dtype == torch.int8 and self.scales[key].shape[1:] != dataset.shape[1:]:
            raise ValueError(f"/scales/{key} has not the width of /{name}")
        if self.kind == contract.RUN_FORMAT:
            return dtype, Extent(name, None, dataset.shape, contract.bits_type(dtype))
        return dtype, _extent(file, name, self.size_bytes, contract.bits_type(dtype), chunks=True)

    def _check_numbers(self) -> None:
        lists = {name.removesuffix("/offset") for name in self.numbers if name.endswith("/offset")}
        self.offsets = {name: self._ints(f"{name}/offset")[:] for name in lists}
        self.ranges = np.column_stack([self._ints("segments/start")[:], self._ints("segments/stop")[:]])
        ends = {name: self.numbers[f"{name}/values"].shape[0] for name in lists - {"segments"}}
        ends["segments"] = len(self.ranges)
        self.n_samples = len(self.offsets["segments"]) - 1
        for name, offset in self.offsets.items():
            if (
                len(offset) != self.n_samples + 1
                or offset[0] != 0
                or offset[-1] != ends[name]
                or np.any(np.diff(offset) < 0)
            ):
                raise ValueError(f"/{name}/offset is not {self.n_samples + 1} ascending numbers up to {ends[name]}")
        start, stop = self.ranges.T
        if len(stop) and (stop.max() > self.n_rows or start.min() < 0 or (start > stop).any()):
            raise ValueError(f"/segments point outside the {self.n_rows} rows")
        if self.numbers["rows/position"].shape[0] != self.n_rows:
            raise ValueError("/rows/position has not as many rows as /rows/token_id")
        if self.scales:
            lines = {extent.shape[0] for extent in self.scales.values()}
            blocks = self._ints("rows/block")[:]
            if len(blocks) != self.n_rows or len(lines) != 1 or np.any((blocks < 0) | (blocks >= min(lines))):
                raise ValueError(f"/rows/block points outside the {lines} lines of /scales")

    def _ints(self, name: str) -> FileArray:
        return FileArray(self.path, self.numbers[name])

    def read_into(self, key: str, ranges: Array, out: Array) -> None:
        """Rows of a site into out, [n, width]: its raw bits; for what is stored as int8, those of float32."""
        if self.dtypes[key] != torch.int8:
            read_ranges(self.path, self.extents[key], ranges, out)
            return
        raw = read_ranges(self.path, self.extents[key], ranges)
        lines = read_ranges(self.path, self.numbers["rows/block"], ranges)
        used, inverse = np.unique(lines, return_inverse=True)
        scales = read_ranges(self.path, self.scales[key], ranges_of(used))
        out.view(np.float32)[:] = eight_bits.restored(raw, scales[inverse])

    @cached_property
    def strings(self) -> dict[int, str]:
        """The token strings of every id that a row has."""
        ids = self._ints("vocabulary/token_id")[:].tolist()
        with self.reading() as file:
            return dict(zip(ids, contract.decode_column(file["vocabulary/token"]), strict=True))

    def contents(self) -> Contents:
        """What it holds; numbers and columns are read when they are used."""
        segments, input_ids, generated_ids = (
            Ragged(self.offsets["segments"], self.ranges),
            *(Ragged(self.offsets[name], self._ints(f"{name}/values")) for name in ("input_ids", "generated_ids")),
        )
        return Contents(
            self.model,
            self.settings,
            self._ints("rows/token_id"),
            self._ints("rows/position"),
            self._ints("rows/block") if self.scales else None,
            segments,
            input_ids,
            generated_ids,
            lambda: self.strings,
            FileColumns(self),
            {} if self.kind == contract.RUN_FORMAT else {key: self._stored(key) for key in self.keys},
        )

    def _stored(self, key: str) -> Activation:
        scales = partial(self.pieces, self.scales[key]) if self.dtypes[key] == torch.int8 else None
        return Activation(self.dtypes[key], self.extents[key].shape[1], partial(self.pieces, self.extents[key]), scales)

    def pieces(self, extent: Extent) -> Iterator[Array]:
        """A dataset from its first row to its last, a few megabytes at a time."""
        step = max(1, _PIECE_BYTES // max(1, extent.row_bytes))
        step = -(-step // eight_bits.BLOCK_ROWS) * eight_bits.BLOCK_ROWS  # whole chunks: none is decompressed twice
        for start in range(0, extent.shape[0], step):
            yield read_ranges(self.path, extent, [(start, min(start + step, extent.shape[0]))])


class FileColumns:
    """The sample table of a file, read when it is asked for."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._whole: dict[str, list[Any]] = {}

    @property
    def names(self) -> list[str]:
        return self._shard.column_names

    def whole(self, name: str) -> list[Any]:
        if name not in self._whole:
            with self._shard.reading() as file:
                self._whole[name] = contract.decode_column(file[f"samples/{name}"])
        return self._whole[name]

    def record(self, index: int) -> dict[str, Any]:
        known = {name: values[index] for name, values in self._whole.items()}
        if len(known) < len(self.names):
            with self._shard.reading() as file:
                for name in self.names:
                    if name not in known:
                        at = slice(index, index + 1)
                        known[name] = contract.decode_column(file[f"samples/{name}"], at)[0]
        return {name: known[name] for name in self.names}


def _group(file: h5py.File, name: str) -> h5py.Group:
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Group):
        raise ValueError(f"/{name} is not a group of this file")
    return file[name]


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose numbers are in this very file."""
    folder, _, own = name.rpartition("/")
    group = _group(file, folder)
    if not isinstance(group.get(own, getlink=True), h5py.HardLink) or not isinstance(group[own], h5py.Dataset):
        raise ValueError(f"/{name} is not a dataset of this file")
    dataset = group[own]
    if dataset.external:
        raise ValueError(f"/{name} has its numbers in another file")
    return dataset


def _number_names(file: h5py.File) -> list[str]:
    names = [f"{group}/{part}" for group in ("input_ids", "generated_ids") for part in ("offset", "values")]
    names += ["segments/offset", "segments/start", "segments/stop", "rows/token_id", "rows/position"]
    return [*names, "vocabulary/token_id", *(["rows/block"] if "block" in file["rows"] else [])]


def _extent(file: h5py.File, name: str, size: int, dtype: Any, *, chunks: bool = False) -> Extent:
    """Where a dataset's numbers lie. Raises ValueError when they are not all in the file, as wide as expected."""
    dataset = _dataset(file, name)
    expected = np.dtype(dtype)
    if dataset.id.get_type().get_size() != expected.itemsize or (
        expected.kind in "if" and not _alike(dataset, expected)
    ):
        raise ValueError(f"/{name} is {dataset.dtype}, expected {expected}")
    n_bytes = math.prod(dataset.shape) * expected.itemsize
    if not n_bytes:
        return Extent(name, 0, dataset.shape, expected)
    if dataset.chunks is not None and chunks:
        _check_chunks(dataset, name, expected.itemsize)
        return Extent(name, None, dataset.shape, expected)
    offset = dataset.id.get_offset()
    if offset is None or dataset.is_virtual or dataset.id.get_storage_size() != n_bytes or offset + n_bytes > size:
        raise ValueError(f"/{name} says {n_bytes} bytes, which are not in the file of {size}")
    return Extent(name, int(offset), dataset.shape, expected)


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


def _check_text_or_numbers(file: h5py.File, name: str, n_values: int, size: int) -> None:
    """Raises ValueError when a column does not have one value a sample, all of them in the file."""
    dataset = _dataset(file, name)
    if dataset.shape != (n_values,):
        raise ValueError(f"/{name} has shape {dataset.shape}, expected [{n_values}]")
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    n_bytes = n_values * (_TEXT_BYTES if is_text else dataset.id.get_type().get_size())
    if n_bytes and (dataset.chunks is not None or dataset.id.get_storage_size() != n_bytes or n_bytes > size):
        raise ValueError(f"/{name} says {n_bytes} bytes, which are not in the file of {size}")

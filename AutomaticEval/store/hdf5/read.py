"""Reads one file. It is checked when it is opened, and never held open.

HDF5's structures, text, shapes, types and ranges are checked when the file is opened; numbers are checked whenever they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import h5py
import numpy as np
import torch

from AutomaticEval.samples import COLUMNS, NO_POSITION, NO_TOKEN
from AutomaticEval.sites import key_order
from AutomaticEval.store import int8
from AutomaticEval.store.contents.file_contents import Activation, Contents, RowFormat
from AutomaticEval.store.finite import counts_in
from AutomaticEval.store.hdf5 import contract
from AutomaticEval.store.hdf5.blocks import FileArray, damaged, read_ranges
from AutomaticEval.store.hdf5.checksums import OF_ATTRIBUTES, ArrayHash
from AutomaticEval.store.hdf5.column_codec import NUMPY, decode_column, decode_texts, decoded, decoded_lists
from AutomaticEval.store.hdf5.extents import Extent, check_column, dataset_of, names_of
from AutomaticEval.store.hdf5.open import OpenedFile
from AutomaticEval.store.ragged import Array, Ragged, ranges_of

_SLAB_BYTES = 8 * 2**20
_NARROW = {contract.place_of_column(name): "<f4" for name in contract.LISTS}
"""The datasets of numbers that are no whole numbers."""
_WIDE = ("offset", "start", "stop", "lines", "n_rows", "size_bytes")
"""Endings of the names of datasets whose numbers have 64 bits; the others have 32."""


class Shard(OpenedFile):
    """A shard, or the `run.h5` over all shards of a run. All of its structures are checked."""

    def _read(self, file: h5py.File) -> None:
        self.columns: dict[str, tuple[str, Extent]] = {}
        """Columns of numbers: their encoding, and where they lie in the file."""
        known = list(COLUMNS)  # a newer minor version may have more
        self.column_names = names_of(file, "samples")
        groups = names_of(file, "/")
        self.lists = [name for name in contract.LISTS if name in groups]
        """Columns with a number for each token of the response."""
        self.group = contract.group_of(self.settings)
        self.is_by_sample = self.group == contract.LINES
        """Whether each sample has a line, in the place of rows."""
        self.has_rows = self.file_format == contract.SHARD_FORMAT or "rows" in groups  # run.h5 of version 1.0 has none
        if self.has_rows:
            self._read_structure(file, groups)
        else:
            self.lists = []
            self.n_samples = len(dataset_of(file, "samples/shard"))
            n_shards = len(dataset_of(file, "shards/name"))
            check_column(file, "shards/name", n_shards, self.size_bytes, self._room)
        self._check_columns(file)
        self.column_names = sorted(
            [*self.column_names, *self.lists], key=lambda name: known.index(name) if name in known else len(known)
        )

    def _read_structure(self, file: h5py.File, groups: Sequence[str]) -> None:
        self.keys = sorted(names_of(file, self.group), key=key_order)
        self.numbers = {
            name: self._extent(file, name, _NARROW.get(name, "<i8" if name.endswith(_WIDE) else "<i4"))
            for name in _number_names(file, groups)
        }
        self.scales = {
            key: self._extent(file, f"scales/{key}", "<f4", 2)
            for key in (names_of(file, "scales") if "scales" in groups else ())
        }
        self.dtypes: dict[str, torch.dtype] = {}
        self.extents: dict[str, Extent] = {}
        for key in self.keys:
            self.dtypes[key], self.extents[key] = self._site(file, key)
        self.n_rows = self.numbers["rows/token_id"].shape[0]
        if self.is_by_sample:
            self.n_rows = next((extent.shape[0] for extent in self.extents.values()), 0)
        matrices = list(names_of(file, contract.PROJECTIONS)) if contract.PROJECTIONS in groups else []
        if contract.EDITS in groups:
            matrices += [f"{contract.EDITS}/{name}" for name in names_of(file, contract.EDITS)]
        self.matrices = {name: self._extent(file, *contract.place_of_matrix(name), 2) for name in matrices}
        self._check_numbers()
        n_tokens = self.numbers["vocabulary/token_id"].shape[0]
        check_column(file, "vocabulary/token", n_tokens, self.size_bytes, self._room)
        for name in ("name", OF_ATTRIBUTES) if "shards" in groups else ():
            n_shards = self.numbers["shards/n_rows"].shape[0]
            check_column(file, f"shards/{name}", n_shards, self.size_bytes, self._room)

    def _check_columns(self, file: h5py.File) -> None:
        for name in list(self.column_names):
            try:
                encoding = check_column(file, f"samples/{name}", self.n_samples, self.size_bytes, self._room)
                if encoding in NUMPY:
                    self.columns[name] = encoding, self._extent(file, f"samples/{name}", NUMPY[encoding])
            except (ValueError, KeyError):
                if name in COLUMNS:
                    raise
                self.column_names.remove(name)  # a newer minor version's, in an encoding that is not known here

    def _check_numbers(self) -> None:
        lists = {name.removesuffix("/offset") for name in self.numbers if name.endswith("/offset")}
        self.offsets = {name: self.ints(f"{name}/offset")[:] for name in lists}
        self.ranges = np.column_stack([self.ints("segments/start")[:], self.ints("segments/stop")[:]])
        if self.is_by_sample:
            line_of = self.ints("lines")[:]
            self.ranges, self.offsets["segments"] = np.column_stack([line_of, line_of + 1]), np.arange(len(line_of) + 1)
        ends = {name: self.numbers[f"{name}/values"].shape[0] for name in lists - {"segments"}}
        ends["segments"] = len(self.ranges)
        self.n_samples = len(self.offsets["segments"]) - 1
        for name, offset in self.offsets.items():
            if (
                len(offset) != max(self.n_samples + 1, 1)
                or offset[0] != 0
                or offset[-1] != ends[name]
                or np.any(offset[1:] < offset[:-1])
            ):
                raise ValueError(f"/{name}/offset is not {self.n_samples + 1} ascending numbers up to {ends[name]}")
        start, stop = self.ranges.T
        if len(stop) and (stop.max() > self.n_rows or start.min() < 0 or (start > stop).any()):
            raise ValueError(f"/segments point outside the {self.n_rows} rows")
        self._check_lengths(stop - start)
        self._check_lists()
        if self.numbers["rows/position"].shape != self.numbers["rows/token_id"].shape:
            raise ValueError("/rows/position has not as many rows as /rows/token_id")
        for key, (n_rows, width) in ((key, extent.shape) for key, extent in self.extents.items()):
            if n_rows != self.n_rows:
                raise ValueError(f"/{self.group}/{key} has {n_rows} rows, expected {self.n_rows}")
            if (self.dtypes[key] == torch.int8) != (key in self.scales) or (
                key in self.scales and self.scales[key].shape[1] != width
            ):
                raise ValueError(f"/scales/{key} is not as wide as its site, or there without numbers of 8 bits")
        if self.scales.keys() - set(self.keys) or bool(self.scales) != ("rows/block" in self.numbers):
            raise ValueError("/scales has not the keys of /activations, or no /rows/block")
        if self.scales:
            lines = {extent.shape[0] for extent in self.scales.values()}
            blocks = self.ints("rows/block")[:]
            if len(blocks) != self.n_rows or len(lines) != 1 or np.any((blocks < 0) | (blocks >= min(lines))):
                raise ValueError(f"/rows/block points outside the {lines} lines of /scales")

    def _check_lengths(self, lengths: Array) -> None:
        """Refuse a sample with more rows than it has tokens, or than the file has rows: a few bytes could ask for any amount of memory."""
        ends = np.concatenate([[0], np.cumsum(lengths)])[self.offsets["segments"]]
        n_prompt, n_response = (np.diff(self.offsets[name]) for name in ("input_ids", "generated_ids"))
        most = np.minimum(n_prompt + np.maximum(n_response - 1, 0), self.n_rows)
        wrong = np.flatnonzero(np.diff(ends) > most)
        if len(wrong):
            raise ValueError(f"/segments give sample {wrong[0]} more rows than it has tokens")

    def _check_lists(self) -> None:
        """Refuse a sample with other numbers than one for each token of its response, or none."""
        n_response = np.diff(self.offsets["generated_ids"])
        for name in self.lists:
            lengths = np.diff(self.offsets[name])
            wrong = np.flatnonzero((lengths != 0) & (lengths != n_response))
            if len(wrong):
                raise ValueError(
                    f"/{name} has {lengths[wrong[0]]} numbers for sample {wrong[0]}, of {n_response[wrong[0]]} tokens"
                )

    def ints(self, name: str) -> FileArray:
        """The dataset of whole numbers with this name, which is sliced like an array."""
        return FileArray(self.path, self.numbers[name])

    def read_into(self, key: str, ranges: Array, out: Array) -> None:
        """Read rows of a site into out, [n, width], as raw bits: of its own dtype, or of float32 for a site that is stored as int8."""
        if self.dtypes[key] != torch.int8:
            read_ranges(self.path, self.extents[key], ranges, out)
            return
        raw = read_ranges(self.path, self.extents[key], ranges)
        out.view(np.float32)[:] = int8.restored(raw, self.read_scales(key, ranges))

    def read_scales(self, key: str, ranges: Array) -> Array:
        """The scales of some int8 rows, [n, width], float32: a number is its stored integer times its scale."""
        lines = read_ranges(self.path, self.numbers["rows/block"], ranges)
        used, inverse = np.unique(lines, return_inverse=True)
        scales: Array = read_ranges(self.path, self.scales[key], ranges_of(used))[inverse]
        return scales

    @property
    def row_formats(self) -> dict[str, RowFormat]:
        """Site -> how its rows are stored."""
        return {key: RowFormat(self.dtypes[key], self.extents[key].shape[1]) for key in self.keys}

    @cached_property
    def non_finite(self) -> dict[str, int]:
        """Site or column -> how many of its numbers are infinite or NaN. Older files do not say it: theirs are missing."""
        with self.reading() as file:
            return counts_in(file, self.group, self.keys, self.column_names)

    @cached_property
    def strings(self) -> dict[int, str]:
        """The token strings of every id that a row has."""
        ids = self.ints("vocabulary/token_id")[:].tolist()
        with self.reading() as file:
            return dict(zip(ids, decode_texts(file["vocabulary/token"]), strict=True))

    def column(self, name: str) -> list[Any]:
        """A column's value for every sample, None where there is none."""
        if name not in self.column_names:
            return [None] * self.n_samples
        return self._values([name], slice(None))[name]

    def record(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        """One sample's values of some columns, which the file must have."""
        return {name: values[0] for name, values in self._values(names, slice(index, index + 1)).items()}

    def _values(self, names: Sequence[str], at: slice) -> dict[str, list[Any]]:
        values: dict[str, list[Any]] = {name: self._listed(name, at) for name in names if name in self.lists}
        for name in set(names) & self.columns.keys():
            encoding, extent = self.columns[name]
            values[name] = decoded(FileArray(self.path, extent)[at], encoding)
        if len(values) < len(names):
            with self.reading() as file:
                values |= {name: _decode(name)(file[f"samples/{name}"], at) for name in names if name not in values}
        return values

    def _listed(self, name: str, at: slice) -> list[Any]:
        """The values of a column of lists, some samples that follow one another."""
        first, stop, _ = at.indices(self.n_samples)
        offset = self.offsets[name][first : stop + 1]
        numbers = FileArray(self.path, self.numbers[contract.place_of_column(name)])[int(offset[0]) : int(offset[-1])]
        return decoded_lists(Ragged(offset, numbers))

    def read_strings(self) -> dict[int, str]:
        """Gives `strings`. It is a method and no lambda, so that a run can be pickled for the workers of a DataLoader."""
        return self.strings

    def contents(self) -> Contents:
        """What the file holds. Numbers and columns are read when they are used."""
        segments, input_ids, generated_ids = (
            Ragged(self.offsets["segments"], self.ranges),
            *(Ragged(self.offsets[name], self.ints(f"{name}/values")) for name in ("input_ids", "generated_ids")),
        )
        return Contents(
            self.model,
            self.settings,
            *self._tokens_of_rows(),
            self.ints("rows/block") if self.scales else None,
            segments,
            input_ids,
            generated_ids,
            self.read_strings,
            FileColumns(self),
            {} if self.file_format == contract.RUN_FORMAT else {key: self._stored(key) for key in self.keys},
            {name: FileArray(self.path, extent) for name, extent in self.matrices.items()},
        )

    def _tokens_of_rows(self) -> tuple[Any, Any]:
        """The token and the position of each row, or what stands for them with a line."""
        if self.is_by_sample:
            return np.full(self.n_rows, NO_TOKEN, np.int32), np.full(self.n_rows, NO_POSITION, np.int32)
        return self.ints("rows/token_id"), self.ints("rows/position")

    def _stored(self, key: str) -> Activation:
        scales = partial(self.slabs, self.scales[key]) if self.dtypes[key] == torch.int8 else None
        return Activation(self.dtypes[key], self.extents[key].shape[1], partial(self.slabs, self.extents[key]), scales)

    def slabs(self, extent: Extent) -> Iterator[Array]:
        """The rows of a dataset from the first to the last, a few megabytes at a time."""
        sums = extent.sums
        hashed = None if sums is None or not sums.only_whole else ArrayHash()
        # whole chunks and blocks: none is decompressed or checked twice
        unit = int8.BLOCK_ROWS if sums is None or sums.only_whole else sums.rows
        step = -(-max(1, _SLAB_BYTES // max(1, extent.row_bytes)) // unit) * unit
        for start in range(0, extent.shape[0], step):
            slab = read_ranges(self.path, extent, [(start, min(start + step, extent.shape[0]))])
            if hashed is not None:
                hashed.add(slab)
            yield slab
        if sums is not None and hashed is not None and int(hashed.hexdigest(), 16) != sums.single:
            raise damaged(self.path, extent.name, 0, extent.shape[0])


class FileColumns:
    """The sample table of a file. A column is read when it is first asked for, and then kept."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._whole: dict[str, list[Any]] = {}

    @property
    def names(self) -> list[str]:
        return self._shard.column_names

    def whole(self, name: str) -> list[Any]:
        if name not in self._whole:
            self._whole[name] = self._shard.column(name)
        return self._whole[name]

    def record(self, index: int) -> dict[str, Any]:
        known = {name: values[index] for name, values in self._whole.items()}
        known |= self._shard.record(index, [name for name in self.names if name not in known])
        return {name: known[name] for name in self.names}


def _decode(name: str) -> Callable[[h5py.Dataset, slice], list[Any]]:
    return decode_texts if COLUMNS.get(name) == "text" else decode_column


def _number_names(file: h5py.File, groups: Sequence[str]) -> list[str]:
    names = [f"{group}/{name}" for group in ("input_ids", "generated_ids") for name in ("offset", "values")]
    names += ["segments/offset", "segments/start", "segments/stop", "rows/token_id", "rows/position"]
    names += [f"{group}/{name}" for group in contract.LISTS if group in groups for name in ("offset", "values")]
    names += ["lines"] if "lines" in groups else []
    names += ["shards/n_lines"] if "shards" in groups and "n_lines" in names_of(file, "shards") else []
    names += ["rows/block"] if "block" in names_of(file, "rows") else []
    names += ["shards/n_rows", "shards/size_bytes"] if "shards" in groups else []
    return [*names, "vocabulary/token_id"]

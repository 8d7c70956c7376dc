"""Writes one file whole: a shard, or the `run.h5` that shows all shards of a run as one. Knows not when."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from AutomaticEval.errors import CaptureError, PathExists, SelectionError
from AutomaticEval.public_names import without_folders
from AutomaticEval.samples import COLUMNS, Sample, check_columns
from AutomaticEval.store import int8
from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.contents.file_contents import Activation, Contents
from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.finite import NON_FINITE, counts_in, n_non_finite, say_non_finite
from AutomaticEval.store.hdf5 import checksums, contract
from AutomaticEval.store.hdf5.extents import load_filters
from AutomaticEval.store.hdf5.new_hdf5 import new_hdf5
from AutomaticEval.store.hdf5.trailer import CHECKSUMS
from AutomaticEval.store.ragged import Array, rechunked

COMPRESSIONS = ("zstd", "lz4", "gzip")
_SLAB_BYTES = 8 * 2**20
_SLAB_NUMBERS = 2**18
"""Numbers of a table that are written at once. Picking them from shards takes about a hundred bytes for each."""
_CHUNK_BYTES = 512 * 2**10
"""Below the 1 MiB that older HDF5 libraries keep in memory for each dataset."""


_SUMMED_BYTES = checksums.BLOCK_BYTES // 16
"""For each so many bytes at most one of checksums: blocks are at least half full, and a checksum has 8 bytes."""


class Source(NamedTuple):
    """A shard that `run.h5` shows."""

    name: str
    n_rows: int
    size_bytes: int
    stamp: str
    """The checksum of its root attributes, by which no other shard is taken for it."""

    non_finite: Mapping[str, int]
    """Site or column -> how many of its numbers are infinite or NaN; without those of files that do not say it."""


def check_compression(compression: str | None) -> None:
    """Raises SelectionError for an unknown one, MissingFilter when its library is not installed."""
    if compression is not None and compression not in COMPRESSIONS:
        raise SelectionError(f"no compression {compression!r}; write {', '.join(COMPRESSIONS)}, or leave it out.")
    if compression in ("zstd", "lz4"):
        load_filters("--compression", compression)


def write_shard(
    path: Path,
    samples: Sequence[Sample],
    model: str,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """Write samples into one file, whole or not at all. strict: then refuse numbers that are infinite or NaN.

    Raises PathExists, FolderNotWritable, DiskFull, NotFinite.
    """
    written = write_file(path, of_samples(samples, model, settings), overwrite=overwrite)
    say_non_finite(path, written.non_finite, strict=strict)


def write_named(
    folder: Path, stem: str, sample: Sample, model: str, settings: Mapping[str, Any], *, strict: bool = False
) -> Path:
    """Write one sample as `stem.h5`, or `stem_2.h5`, … when the name is taken. Returns the path; raises what `write_shard` does."""
    for number in itertools.count(1):
        path = folder / (f"{stem}.h5" if number == 1 else f"{stem}_{number}.h5")
        if path.exists():
            continue
        try:
            write_shard(path, [sample], model, settings, strict=strict)
        except PathExists:  # taken by another process just now
            continue
        return path
    raise AssertionError("unreachable")


def write_file(
    path: Path,
    held: Contents,
    *,
    overwrite: bool = False,
    compression: str | None = None,
    replaces: Sequence[str] = (),
) -> Source:
    """Write a shard, whole or not at all. replaces: the shards that it takes the place of.

    Raises PathExists, FolderNotWritable, DiskFull, CaptureError.
    """
    if not held.activations:
        raise CaptureError(f"{path}: no sample has activations; nothing is written.")
    rows_bytes = held.n_rows * sum(each.width * each.dtype.itemsize for each in held.activations.values())
    with new_hdf5(path, rows_bytes + rows_bytes // _SUMMED_BYTES + _table_bytes(held), overwrite=overwrite) as file:
        more = {"replaces": json.dumps(list(replaces))} if replaces else {}
        stamp = _write_attributes(file, contract.SHARD_FORMAT, held, more)
        for key, activation in held.activations.items():
            _write_activation(file, key, activation, held.n_rows, compression)
        _write_table(file, held)
        counts = counts_in(file, held.activations, held.columns.names)
    return Source(path.name, held.n_rows, path.stat().st_size, stamp, counts)


def write_run(path: Path, held: Contents, sources: Sequence[Source], *, finished: bool) -> dict[str, int]:
    """Write `run.h5` over shards in its folder; the rows of held are those of the sources, one after the other.

    Returns the numbers that are infinite or NaN, as `Source.non_finite`.
    """
    with new_hdf5(path, _table_bytes(held) + 4096 * len(sources), overwrite=True) as file:
        _write_attributes(file, contract.RUN_FORMAT, held, {"state": "finished" if finished else "unfinished"})
        for key, activation in held.activations.items():
            _write_virtual(file, key, activation, sources)
        _write_table(file, held)
        _write_text(file, "shards/name", [source.name for source in sources])
        _write_text(file, f"shards/{checksums.OF_ATTRIBUTES}", [source.stamp for source in sources])
        for name in ("n_rows", "size_bytes"):
            _write_numbers(file, f"shards/{name}", np.array([getattr(source, name) for source in sources]), "<i8")
        return counts_in(file, held.activations, held.columns.names)


def _table_bytes(held: Contents) -> int:
    """More than everything but the activations takes in a file."""
    names = [name for name in held.columns.names if name in COLUMNS]
    text = sum(
        len(value.encode("utf-8", "replace")) if isinstance(value, str) else 64 if value is None else len(str(value))
        for name in names
        if COLUMNS[name] in ("text", "json")
        for value in held.columns.whole(name)
    )
    ids = len(held.input_ids.values) + len(held.generated_ids.values) + 2 * len(held.segments.values)
    scales = 0 if held.blocks is None else int(np.max(held.blocks[:], initial=-1)) + 1
    widths = sum(each.width for each in held.activations.values())
    strings = held.strings()
    numbers = 12 * held.n_rows + 8 * ids + 4 * scales * widths
    texts = 2 * text + 64 * len(names) * held.n_samples + sum(64 + 4 * len(each) for each in strings.values())
    headers = 2**18 + 4096 * len(held.activations) + len(contract.as_json(held.settings))
    return headers + numbers + numbers // _SUMMED_BYTES + texts


def _write_attributes(file: h5py.File, kind: str, held: Contents, more: Mapping[str, str]) -> str:
    attributes = {
        "format": kind,
        "format_version": ".".join(map(str, contract.VERSION)),
        "model": contract.attribute_text(without_folders(held.model)),
        "created": datetime.now().astimezone().isoformat(),
        "settings": contract.as_json(held.settings),
        **more,
    }
    stamp = checksums.of_attributes(attributes)
    file.attrs.update({**attributes, checksums.OF_ATTRIBUTES: stamp})
    return stamp


def _write_table(file: h5py.File, held: Contents) -> None:
    """Everything but the activations."""
    _write_numbers(file, "rows/token_id", held.token_ids, "<i4")
    _write_numbers(file, "rows/position", held.positions, "<i4")
    if held.blocks is not None:
        _write_numbers(file, "rows/block", held.blocks, "<i4")
        for key, activation in held.activations.items():
            assert activation.scales is not None
            _write_numbers(file, f"scales/{key}", _together(activation.scales(), activation.width), "<f4")
    for name in ("segments", "input_ids", "generated_ids"):
        _write_numbers(file, f"{name}/offset", getattr(held, name).offset, "<i8")
    ranges = held.segments.values[:].reshape(-1, 2)
    _write_numbers(file, "segments/start", ranges[:, 0], "<i8")
    _write_numbers(file, "segments/stop", ranges[:, 1], "<i8")
    _write_numbers(file, "input_ids/values", held.input_ids.values, "<i4")
    _write_numbers(file, "generated_ids/values", held.generated_ids.values, "<i4")
    strings = held.strings()
    _write_numbers(file, "vocabulary/token_id", np.array(sorted(strings)), "<i4")
    _write_text(file, "vocabulary/token", [strings[token] for token in sorted(strings)])
    _write_columns(file, held.columns)


def _together(slabs: Iterator[Array], width: int) -> Array:
    found = list(slabs)
    return np.concatenate(found) if found else np.empty((0, width), np.float32)


def _write_activation(file: h5py.File, key: str, activation: Activation, n_rows: int, compression: str | None) -> None:
    """One dataset, written slab after slab as raw bits, its checksum on the way."""
    stored = contract.hdf5_type(activation.dtype)
    dataset = _create(file, f"activations/{key}", stored, (n_rows, activation.width), compression)
    row_bytes = max(1, activation.width * stored.get_size())
    rows = dataset.chunks[0] if dataset.chunks else checksums.rows_per_block(row_bytes)
    hashed, n_wrong = checksums.ArrayHash(rows * row_bytes), 0
    # whole chunks, and whole blocks of scales, so that neither is written twice
    step = -(-max(1, _SLAB_BYTES // row_bytes) // int8.BLOCK_ROWS) * int8.BLOCK_ROWS
    space, at, started = dataset.id.get_space(), 0, 0
    whole = compression is not None or activation.dtype == torch.int8
    for slab in rechunked(activation.slabs(), step) if whole else activation.slabs():
        values = np.ascontiguousarray(slab)
        space.select_hyperslab((at, 0), values.shape)
        dataset.id.write(h5py.h5s.create_simple(values.shape), space, values, mtype=stored)
        hashed.add(values)
        n_wrong += n_non_finite(values, activation.dtype)
        at += len(values)
        if not whole and (at - started) * row_bytes >= _SLAB_BYTES:
            _start_writing(file, dataset.id.get_offset() + started * row_bytes, (at - started) * row_bytes)
            started = at
    assert at == n_rows, f"{key}: {at} rows came, expected {n_rows}"
    dataset.attrs["dtype"] = str(activation.dtype).removeprefix("torch.")
    dataset.attrs[NON_FINITE] = n_wrong
    _write_checksums(dataset, hashed, rows)


def _write_checksums(dataset: h5py.Dataset, hashed: checksums.ArrayHash, rows: int) -> None:
    """The dataset's own, and where it has several blocks of so many rows, those of the blocks."""
    dataset.attrs[checksums.NAME] = hashed.hexdigest()
    blocks = hashed.blocks()
    if len(blocks) > 1:
        made = dataset.file.create_dataset(f"{CHECKSUMS}{dataset.name}", data=blocks, track_times=False)
        made.attrs["rows"] = rows
        made.attrs[checksums.NAME] = checksums.of_numbers([blocks])


def _start_writing(file: h5py.File, offset: int, n_bytes: int) -> None:
    """Have the system put bytes on the disk while the next ones are made, so that the fsync at the end finds little left."""
    if hasattr(os, "posix_fadvise"):
        with Path(file.filename).open("rb") as written:
            os.posix_fadvise(written.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)


def _create(
    file: h5py.File, name: str, stored: h5py.h5t.TypeID, shape: tuple[int, int], compression: str | None
) -> h5py.Dataset:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if all(shape):  # HDF5 refuses contiguous data without rows
        settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        if compression is None:
            settings.set_layout(h5py.h5d.CONTIGUOUS)
            settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        else:
            _compress(settings, shape, stored.get_size(), compression)
    group, _, own = name.rpartition("/")
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.require_group(group).id, own.encode(), stored, space, dcpl=settings))


def _compress(settings: Any, shape: tuple[int, int], item_bytes: int, compression: str) -> None:
    rows = max(1, _CHUNK_BYTES // (shape[1] * item_bytes))
    rows = 2 ** (min(rows, int8.BLOCK_ROWS).bit_length() - 1)  # divides the slabs that are written
    settings.set_chunk((min(rows, shape[0]), shape[1]))
    if item_bytes > 1:
        settings.set_shuffle()
    if compression == "gzip":
        settings.set_deflate(1)
        return
    plugin = load_filters("--compression", compression)
    chosen = plugin.Zstd(clevel=1) if compression == "zstd" else plugin.LZ4()
    settings.set_filter(chosen["compression"], h5py.h5z.FLAG_MANDATORY, chosen["compression_opts"])


def _write_virtual(file: h5py.File, key: str, activation: Activation, sources: Sequence[Source]) -> None:
    """A dataset that shows the rows of all sources. Where a source is missing, HDF5 gives NaN (or -128), never zeros."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    empty = np.array(-128, np.int8) if activation.dtype == torch.int8 else np.array(np.nan, np.float32)
    settings.set_fill_value(empty)
    n_rows = sum(source.n_rows for source in sources)
    at = 0
    for source in sources:
        if source.n_rows:
            space = h5py.h5s.create_simple((n_rows, activation.width))
            space.select_hyperslab((at, 0), (source.n_rows, activation.width))
            theirs = h5py.h5s.create_simple((source.n_rows, activation.width))
            settings.set_virtual(space, source.name.encode(), f"/activations/{key}".encode(), theirs)
            at += source.n_rows
    stored, space = contract.hdf5_type(activation.dtype), h5py.h5s.create_simple((n_rows, activation.width))
    group = file.require_group("activations")
    made = h5py.h5d.create(group.id, key.encode(), stored, space, dcpl=settings)
    attributes = h5py.Dataset(made).attrs
    attributes["dtype"] = str(activation.dtype).removeprefix("torch.")
    if all(key in source.non_finite for source in sources):
        attributes[NON_FINITE] = sum(source.non_finite[key] for source in sources)


def _write_numbers(file: h5py.File, name: str, values: Any, dtype: str) -> None:
    shape = values[:0].shape[1:]
    dataset = file.create_dataset(name, (len(values), *shape), dtype, track_times=False)
    rows = checksums.rows_per_block(dataset.dtype.itemsize * math.prod(shape))
    hashed = checksums.ArrayHash(rows * dataset.dtype.itemsize * math.prod(shape))
    step = max(1, _SLAB_NUMBERS // max(1, math.prod(shape)))
    for at in range(0, len(values), step):
        given = np.asarray(values[at : at + step])
        slab = np.ascontiguousarray(given, dtype=dtype)
        if given.dtype.kind in "iu" and not np.array_equal(given, slab):
            raise CaptureError(f"/{name} holds numbers that {dtype} cannot hold: {given.min()} to {given.max()}.")
        dataset[at : at + step] = slab
        hashed.add(slab)
    _write_checksums(dataset, hashed, rows)


def _write_text(file: h5py.File, name: str, values: Sequence[str]) -> None:
    texts, encoding = contract.encode_text(values)
    _write_strings(file, name, texts, encoding)


def _write_strings(file: h5py.File, name: str, texts: Sequence[str], encoding: str) -> None:
    dataset = file.create_dataset(name, data=texts, dtype=contract.TEXT, shape=(len(texts),), track_times=False)
    dataset.attrs["encoding"] = encoding
    dataset.attrs[checksums.NAME] = checksums.of_text(texts)


def _write_columns(file: h5py.File, columns: Columns) -> None:
    """`/samples`: one dataset a column. Raises CaptureError for one that the format does not have, such as a newer version's."""
    check_columns(columns.names)
    group = file.require_group("samples")
    for name in COLUMNS:
        if name not in columns.names:
            continue
        values, encoding = contract.encode_column(name, columns.whole(name))
        if encoding in ("utf-8", "json"):
            _write_strings(group, name, list(values), encoding)
            continue
        numbers = np.asarray(values)
        _write_numbers(file, f"samples/{name}", numbers, numbers.dtype.str)
        group[name].attrs["encoding"] = encoding
        if encoding == "float":
            group[name].attrs[NON_FINITE] = contract.n_non_finite_floats(numbers)

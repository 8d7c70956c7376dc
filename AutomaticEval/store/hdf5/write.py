"""Writes one file, whole or not at all: a shard, or the `run.h5` that shows all shards of a run as one.

Does not know when a file is to be written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from AutomaticEval.errors import CaptureError, PathExists, SelectionError
from AutomaticEval.public_names import without_folders
from AutomaticEval.samples import COLUMNS, Sample
from AutomaticEval.store.contents.changed import without_rows
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.disk.file_names import numbered
from AutomaticEval.store.disk.flushing import flushing
from AutomaticEval.store.disk.json_text import as_json
from AutomaticEval.store.disk.whole_files import new_file
from AutomaticEval.store.finite import counts_in, report_non_finite
from AutomaticEval.store.hdf5 import checksums, contract
from AutomaticEval.store.hdf5.attributes import attribute_text
from AutomaticEval.store.hdf5.extents import load_filters
from AutomaticEval.store.hdf5.writing.activations import Source, write_activations, write_virtual
from AutomaticEval.store.hdf5.writing.new_hdf5 import new_hdf5, release_reserved
from AutomaticEval.store.hdf5.writing.numbers import write_numbers
from AutomaticEval.store.hdf5.writing.sample_table import write_columns, write_text
from AutomaticEval.store.ragged import Array

COMPRESSIONS = ("zstd", "lz4", "gzip")
_SUMMED_BYTES = checksums.BLOCK_BYTES // 16
"""The checksums of blocks take at most one byte for each _SUMMED_BYTES bytes: a block is at least half full, and its checksum has 8 bytes."""


def check_compression(compression: str | None) -> None:
    """Raises SelectionError for an unknown compression, and MissingFilter when the library of a known one is not installed."""
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
    matrices: Mapping[str, Any] = {},
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """Write samples into one file, whole or not at all.

    matrices: those of the projection by which the rows were made: name -> [width, k].
    strict: raise NotFinite for numbers that are infinite or NaN, which are written all the same; without it, warn of them.
    Raises PathExists, FolderNotWritable, DiskFull, NotFinite.
    """
    written = write_file(path, of_samples(samples, model, settings, matrices=matrices), overwrite=overwrite)
    report_non_finite(path, written.non_finite, strict=strict)


def write_named(path: Path, sample: Sample, model: str, settings: Mapping[str, Any], **how: Any) -> Path:
    """Write one sample as `france.h5`, or `france-2.h5`, … when the name is taken, also by another process just now. Returns the path.

    how: as for `write_shard`, which says what is raised.
    """
    for number in itertools.count(1):
        free = numbered(path, number)
        if free.exists():
            continue
        try:
            write_shard(free, [sample], model, settings, **how)
        except PathExists:  # taken by another process just now
            continue
        return free
    raise AssertionError("unreachable")


def write_file(
    path: Path,
    contents: Contents,
    *,
    overwrite: bool = False,
    compression: str | None = None,
    replaces: Sequence[str] = (),
) -> Source:
    """Write a shard, whole or not at all.

    replaces: names of the shards whose place it takes.
    Raises PathExists, FolderNotWritable, DiskFull, CaptureError.
    """
    with filled_file(path, contents, overwrite=overwrite, compression=compression, replaces=replaces) as source:
        return source


@contextmanager
def filled_file(
    path: Path,
    contents: Contents,
    *,
    overwrite: bool = False,
    compression: str | None = None,
    replaces: Sequence[str] = (),
) -> Iterator[Source]:
    """`write_file` in two steps: all bytes are written, and contents let go of, when the with begins; the disk has them, and the file its
    name, when the with ends without an error.
    """
    if not contents.activations:
        raise CaptureError(f"{path}: no sample has activations; nothing is written.")
    with new_file(path, overwrite=overwrite) as partial:
        with flushing(partial) as written:
            source = _fill(partial, contents, compression, replaces)
            written.set()
            del contents
            yield source
        release_reserved(partial)


def _fill(partial: Path, contents: Contents, compression: str | None, replaces: Sequence[str]) -> Source:
    rows_bytes = contents.n_rows * sum(each.width * each.dtype.itemsize for each in contents.activations.values())
    with new_hdf5(partial, rows_bytes + rows_bytes // _SUMMED_BYTES + _table_bytes(contents)) as file:
        more = {"replaces": json.dumps(list(replaces))} if replaces else {}
        stamp = _write_attributes(file, contract.SHARD_FORMAT, contents, more)
        group = contract.group_of(contents.settings)
        write_activations(file, group, contents.activations, contents.n_rows, compression)
        _write_table(file, contents)
        counts = counts_in(file, group, contents.activations, contents.columns.names)
    return Source(partial.name, contents.n_rows, partial.stat().st_size, stamp, counts)


def write_run(path: Path, contents: Contents, sources: Sequence[Source], *, finished: bool) -> dict[str, int]:
    """Write `run.h5` over the shards in its folder. The rows of contents are those of the sources, one source after the other.

    Returns how many numbers are infinite or NaN, in the form of `Source.non_finite`.
    """
    with new_file(path, overwrite=True) as partial:
        with new_hdf5(partial, _table_bytes(contents) + 4096 * len(sources)) as file:
            counts = _fill_index(file, contents, sources, finished=finished)
        release_reserved(partial)
    return counts


def _fill_index(file: h5py.File, contents: Contents, sources: Sequence[Source], *, finished: bool) -> dict[str, int]:
    _write_attributes(file, contract.RUN_FORMAT, contents, {"state": "finished" if finished else "unfinished"})
    group = contract.group_of(contents.settings)
    for key, activation in contents.activations.items():
        write_virtual(file, f"{group}/{key}", activation, sources)
    _write_table(file, contents)
    write_text(file, "shards/name", [source.name for source in sources])
    write_text(file, f"shards/{checksums.OF_ATTRIBUTES}", [source.stamp for source in sources])
    n_rows, size_bytes = (np.array([getattr(each, name) for each in sources]) for name in ("n_rows", "size_bytes"))
    if contents.is_by_sample:
        write_numbers(file, "shards/n_lines", n_rows, "<i8")
        n_rows = np.zeros_like(n_rows)
    write_numbers(file, "shards/n_rows", n_rows, "<i8")
    write_numbers(file, "shards/size_bytes", size_bytes, "<i8")
    return counts_in(file, group, contents.activations, contents.columns.names)


def _table_bytes(contents: Contents) -> int:
    """An upper bound of the bytes that everything but the activations takes in a file."""
    names = [name for name in contents.columns.names if name in COLUMNS]
    text = sum(
        _text_bytes(value)
        for name in names
        if COLUMNS[name] in ("text", "json")
        for value in contents.columns.whole(name)
    )
    ids = len(contents.input_ids.values) + len(contents.generated_ids.values) + 2 * len(contents.segments.values)
    scales = 0 if contents.blocks is None else int(np.max(contents.blocks[:], initial=-1)) + 1
    widths = sum(each.width for each in contents.activations.values())
    strings = contents.strings()
    numbers = 12 * contents.n_rows + 8 * ids + 4 * scales * widths
    texts = 2 * text + 64 * len(names) * contents.n_samples + sum(64 + 4 * len(each) for each in strings.values())
    headers = 2**18 + 4096 * len(contents.activations) + len(as_json(contents.settings))
    numbers += 4 * len(contents.generated_ids.values) * sum(name in contract.LISTS for name in names)
    numbers += 8 * sum(int(np.size(each[:])) for each in contents.matrices.values())
    return headers + numbers + numbers // _SUMMED_BYTES + texts


def _text_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
    return 64 if value is None else len(str(value))


def _write_attributes(file: h5py.File, file_format: str, contents: Contents, more: Mapping[str, str]) -> str:
    """Returns the checksum of the attributes."""
    attributes = {
        "format": file_format,
        "format_version": ".".join(map(str, contract.VERSION)),
        "model": attribute_text(without_folders(contents.model)),
        "created": datetime.now().astimezone().isoformat(),
        "settings": as_json(contents.settings),
        **more,
    }
    stamp = checksums.of_attributes(attributes)
    file.attrs.update({**attributes, checksums.OF_ATTRIBUTES: stamp})
    return stamp


def _write_table(file: h5py.File, contents: Contents) -> None:
    """Write everything but the activations."""
    for name, matrix in contents.matrices.items():
        place, kind = contract.place_of_matrix(name)
        write_numbers(file, place, matrix, kind)
    if contents.is_by_sample:
        write_numbers(file, "lines", contents.segments.values[:].reshape(-1, 2)[:, 0], "<i8")
        file.create_group(contract.ROWS)
        contents = without_rows(contents)
    write_numbers(file, "rows/token_id", contents.token_ids, "<i4")
    write_numbers(file, "rows/position", contents.positions, "<i4")
    scales = {
        key: each.scales for key, each in contents.activations.items() if each.scales is not None
    }  # ids have none
    if contents.blocks is not None and scales:
        write_numbers(file, "rows/block", contents.blocks, "<i4")
        for key, own in scales.items():
            write_numbers(file, f"scales/{key}", _together(own(), contents.activations[key].width), "<f4")
    for name in ("segments", "input_ids", "generated_ids"):
        write_numbers(file, f"{name}/offset", getattr(contents, name).offset, "<i8")
    ranges = contents.segments.values[:].reshape(-1, 2)
    write_numbers(file, "segments/start", ranges[:, 0], "<i8")
    write_numbers(file, "segments/stop", ranges[:, 1], "<i8")
    write_numbers(file, "input_ids/values", contents.input_ids.values, "<i4")
    write_numbers(file, "generated_ids/values", contents.generated_ids.values, "<i4")
    strings = contents.strings()
    write_numbers(file, "vocabulary/token_id", np.array(sorted(strings)), "<i4")
    write_text(file, "vocabulary/token", [strings[token] for token in sorted(strings)])
    write_columns(file, contents.columns)


def _together(slabs: Iterator[Array], width: int) -> Array:
    none = np.empty((0, width), np.float32)
    return np.concatenate([none, *slabs])

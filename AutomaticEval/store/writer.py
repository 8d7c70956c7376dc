"""Writes shards and runs: gathered in memory, written whole under a temporary name, fsynced, then named.

No HDF5 file is open while a model runs. Knows nothing of where samples come from.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import h5py
import numpy as np
import torch

from AutomaticEval.errors import CaptureError, DiskFull, FolderNotWritable, PathExists, StoreError
from AutomaticEval.store import format as contract
from AutomaticEval.store.format import Ragged, Rows, Sample

SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 300
"""A shard is sealed at this size or age, so that a process that is killed loses minutes at most."""
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG)


def hdf5_path(path: str | Path) -> Path:
    """Where a save path is written: itself, or `.h5` beside a pickle's name, with a warning that says so."""
    given = Path(path).expanduser()
    if given.suffix.lower() not in PICKLE_SUFFIXES:
        return given
    written = given.with_suffix(".h5")
    warnings.warn(f"files are HDF5: {given} is written as {written}", UserWarning, stacklevel=3)
    return written


def prepare_file(path: Path, *, overwrite: bool = False) -> None:
    """Refuse, before any work, a file that could not be written afterwards; make its folder.

    Raises PathExists, FolderNotWritable.
    """
    if path.is_dir():
        raise PathExists(f"{path} is a folder; give the name of a file in it.")
    if path.exists() and not overwrite:
        raise PathExists(
            f"{path} exists and is not overwritten; choose another name or pass overwrite=True (--overwrite)."
        )
    prepare_folder(path.parent)


def prepare_folder(folder: Path) -> None:
    """Make a folder and check that it can be written. Raises FolderNotWritable, DiskFull."""
    with _named_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{uuid4().hex}.partial"
        trial.touch()
        trial.unlink()


def ensure_space(folder: Path, size_bytes: int) -> None:
    """Raises DiskFull when the disk that holds folder has less than size_bytes free."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size_bytes:
        raise DiskFull(
            f"{folder}: {size_text(size_bytes)} are needed and {size_text(free)} are free; choose another folder, fewer "
            "--layers or --sites, or --positions scored."
        )


def size_text(size_bytes: float) -> str:
    """1536 -> '1.5 KB', in powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TB"


def write_shard(
    path: Path, samples: Sequence[Sample], model: str, settings: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write samples into one file, whole or not at all.

    Raises PathExists, FolderNotWritable, DiskFull.
    """
    blocks = list({id(sample.rows): sample.rows for sample in samples}.values())
    with _new_file(path, overwrite=overwrite) as file:
        _write_attributes(file, contract.SHARD_FORMAT, model, settings)
        first_row = _write_rows(file, blocks)
        _write_sequences(file, samples, first_row)
        _write_vocabulary(file, samples, blocks)
        write_columns(file, [sample.fields for sample in samples])


@contextmanager
def _new_file(path: Path, *, overwrite: bool = False) -> Iterator[h5py.File]:
    """An HDF5 file that gets its name only when it is complete and on the disk."""
    partial = path.parent / f".{path.name[:80]}.{uuid4().hex}.partial"
    with _named_failures(path):
        try:
            with h5py.File(partial, "w", libver=("earliest", "v110")) as file:
                yield file
            _sync(partial)
            _publish(partial, path, overwrite=overwrite)
            with suppress(OSError):  # some file systems cannot; the file itself is on the disk
                _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Name a finished file. A hard link fails when the name is taken, also by another process just now."""
    if overwrite:
        partial.replace(path)
        return
    try:
        os.link(partial, path)
    except FileExistsError:
        raise PathExists(f"{path} exists and is not overwritten; choose another name.") from None
    except OSError:  # file systems without hard links
        if path.exists():
            raise PathExists(f"{path} exists and is not overwritten; choose another name.") from None
        partial.rename(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals, also those that HDF5 wraps, into ours."""
    try:
        yield
    except (OSError, RuntimeError) as failure:  # HDF5 raises RuntimeError when it cannot close a file on a full disk
        said = next((c for c in (*_FULL, *_DENIED) if f"errno = {c}," in str(failure)), None)
        code = getattr(failure, "errno", None) or said
        if code is None:
            raise
        if code in _FULL:
            raise DiskFull(f"the disk is full: {path} was not written, and nothing of it was left behind.") from failure
        if code in _DENIED:
            raise FolderNotWritable(f"{path} cannot be written ({os.strerror(code)}); choose another.") from failure
        raise StoreError(f"{path} cannot be written: {failure}") from failure


def _write_attributes(file: h5py.File, kind: str, model: str, settings: Mapping[str, Any]) -> None:
    file.attrs["format"] = kind
    file.attrs["format_version"] = ".".join(map(str, contract.VERSION))
    file.attrs["model"] = model
    file.attrs["created"] = datetime.now().astimezone().isoformat()
    file.attrs["settings"] = json.dumps(settings, default=str)


def _write_rows(file: h5py.File, blocks: Sequence[Rows]) -> dict[int, int]:
    """All rows, block after block. Returns the first row of each block, by its id. Raises CaptureError."""
    shapes = [{key: (rows.dtype, rows.shape[1:]) for key, rows in block.activations.items()} for block in blocks]
    lengths = [{len(block.positions), len(block.token_ids), *map(len, block.activations.values())} for block in blocks]
    if any(shape != shapes[0] for shape in shapes) or any(len(length) > 1 for length in lengths):
        raise CaptureError("rows of different sites, dtypes, widths or lengths cannot be stored in one file.")
    first_row, n_rows = {}, 0
    for block in blocks:
        first_row[id(block)] = n_rows
        n_rows += len(block.positions)
    for key in blocks[0].activations if blocks else ():
        _write_key(file, key, [block.activations[key] for block in blocks])
    _write_ints(file, "rows/token_id", [token for block in blocks for token in block.token_ids], "<i4")
    _write_ints(file, "rows/position", [position for block in blocks for position in block.positions], "<i4")
    return first_row


def _write_key(file: h5py.File, key: str, pieces: Sequence[torch.Tensor]) -> None:
    """One contiguous dataset, written piece after piece as raw bits."""
    width, dtype = pieces[0].shape[1], pieces[0].dtype
    n_rows = sum(len(piece) for piece in pieces)
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if n_rows:  # HDF5 refuses contiguous data without rows
        settings.set_layout(h5py.h5d.CONTIGUOUS)
        settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((n_rows, width))
    group = file.require_group("activations")
    stored = contract.hdf5_type(dtype)
    dataset = h5py.h5d.create(group.id, key.encode(), stored, space, dcpl=settings)
    h5py.Dataset(dataset).attrs["dtype"] = str(dtype).removeprefix("torch.")
    at = 0
    for piece in pieces:
        if len(piece):
            space.select_hyperslab((at, 0), piece.shape)
            dataset.write(h5py.h5s.create_simple(piece.shape), space, contract.bits(piece), mtype=stored)
            at += len(piece)


def _write_ints(file: h5py.File, name: str, values: Sequence[int], dtype: str = "<i8") -> None:
    file.create_dataset(name, data=np.array(values, dtype=dtype), track_times=False)


def _write_sequences(file: h5py.File, samples: Sequence[Sample], first_row: Mapping[int, int]) -> None:
    starts, stops, offset = [], [], [0]
    for sample in samples:
        for start, stop in _runs([first_row[id(sample.rows)] + index for index in sample.where]):
            starts.append(start)
            stops.append(stop)
        offset.append(len(starts))
    for name, values in (("offset", offset), ("start", starts), ("stop", stops)):
        _write_ints(file, f"segments/{name}", values)
    for name in ("input_ids", "generated_ids"):
        ragged = Ragged()
        for sample in samples:
            ragged.add(getattr(sample, name))
        _write_ints(file, f"{name}/offset", ragged.offset)
        _write_ints(file, f"{name}/values", ragged.values, "<i4")


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as half-open ranges: [3, 4, 7] -> [(3, 5), (7, 8)]."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def _write_vocabulary(file: h5py.File, samples: Sequence[Sample], blocks: Sequence[Rows]) -> None:
    strings: dict[int, str] = {}
    for block in blocks:
        strings.update(zip(block.token_ids, block.tokens, strict=True))
    _write_ints(file, "vocabulary/token_id", sorted(strings), "<i4")
    _write_text(file, "vocabulary/token", [strings[token] for token in sorted(strings)])


def _write_text(file: h5py.File, name: str, values: Sequence[str]) -> None:
    texts, encoding = contract.encode_text(values)
    dataset = file.create_dataset(name, data=texts, dtype=contract.TEXT, shape=(len(texts),), track_times=False)
    dataset.attrs["encoding"] = encoding


def write_columns(file: h5py.File, records: Sequence[Mapping[str, Any]]) -> None:
    """`/samples`: one dataset a column that any record has."""
    unknown = {name for record in records for name in record} - set(contract.COLUMNS)
    assert not unknown, f"columns that the format does not have: {unknown}"
    for name in contract.COLUMNS:
        if any(name in record for record in records):
            values, encoding = contract.encode_column(name, [record.get(name) for record in records])
            dtype = contract.TEXT if encoding in ("utf-8", "json") else None
            dataset = file.create_dataset(f"samples/{name}", data=values, dtype=dtype, track_times=False)
            dataset.attrs["encoding"] = encoding


class RunWriter:
    """Gathers a run's samples and seals a shard whenever enough of them are in memory.

    Nothing is lost when `close` is called on every exit: what was gathered is sealed.
    """

    def __init__(self, folder: Path, model: str, settings: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.size_bytes = 0
        """Size of the sealed shards on disk."""
        self._model, self._settings, self._shard_bytes = model, {**settings, "run_id": uuid4().hex}, shard_bytes
        self._since = time.monotonic()
        self._gathered: list[Sample] = []
        self._blocks: dict[int, int] = {}
        self._records: list[dict[str, Any]] = []
        self._shards: list[str] = []
        prepare_folder(folder)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The columns of every sealed sample, with its shard and index."""
        return self._records

    def add(self, samples: Sequence[Sample]) -> None:
        """Take samples that may share rows. Raises DiskFull when a shard cannot be sealed."""
        self._gathered.extend(samples)
        self._blocks.update((id(sample.rows), sample.rows.size_bytes) for sample in samples)
        if sum(self._blocks.values()) >= self._shard_bytes or time.monotonic() - self._since > SHARD_SECONDS:
            self.seal()

    def seal(self) -> None:
        """Write what is gathered as the next shard."""
        if not self._gathered:
            return
        path = self.folder / f"shard-{len(self._shards):05d}.h5"
        write_shard(path, self._gathered, self._model, self._settings)
        for index, sample in enumerate(self._gathered):
            self._records.append({**sample.fields, "shard": len(self._shards), "index": index})
        self._shards.append(path.name)
        self.size_bytes += path.stat().st_size
        self._gathered, self._blocks, self._since = [], {}, time.monotonic()

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write `run.h5`: these records, one a sample, with what the evaluation said of each."""
        self.seal()
        with _new_file(self.folder / "run.h5", overwrite=True) as file:
            _write_attributes(file, contract.RUN_FORMAT, self._model, self._settings)
            _write_text(file, "shards/name", self._shards)
            write_columns(file, records)


def write_named(folder: Path, stem: str, sample: Sample, model: str, settings: Mapping[str, Any]) -> Path:
    """Write one sample as `stem.h5`, or `stem_2.h5`, … when the name is taken. Returns the path."""
    for number in itertools.count(1):
        path = folder / (f"{stem}.h5" if number == 1 else f"{stem}_{number}.h5")
        if path.exists():
            continue
        try:
            write_shard(path, [sample], model, settings)
        except PathExists:  # taken by another process just now
            continue
        return path
    raise AssertionError("unreachable")


def file_stem(prefix: str, text: str, now: datetime | None = None) -> str:
    """`<prefix>_20240915_143022_123456_What_is_the_capital_of`: time to the microsecond, first words of the text."""
    name = "_".join(re.findall(r"\w+", text)[:5])
    while len(name.encode("utf-8", "replace")) > 60:  # names are limited in bytes; a Chinese character is three
        name = name[:-1]
    return f"{prefix}_{now or datetime.now():%Y%m%d_%H%M%S_%f}_{name.strip('_') or 'question'}"

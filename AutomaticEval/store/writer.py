"""Writes a run: samples gathered in memory, sealed into shards by a thread of their own, and one `run.h5` over them.

No HDF5 file is open while a model runs but the one that is being sealed. Whatever kills the process, every file that has its
name is whole, and a writer that resumes goes on from there. Knows nothing of where samples come from.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout

from AutomaticEval.errors import (
    AutomaticEvalError,
    CaptureError,
    DamagedFile,
    FolderInUse,
    NotActivations,
    OtherSettings,
    StoreError,
    TruncatedFile,
)
from AutomaticEval.samples import Sample
from AutomaticEval.settings import differing
from AutomaticEval.store.contents.changed import reordered
from AutomaticEval.store.contents.columns import Columns, Listed, records_of
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.disk.partial_folders import clear_leftovers
from AutomaticEval.store.disk.whole_files import named_failures, prepare_folder
from AutomaticEval.store.finite import say_non_finite
from AutomaticEval.store.hdf5.checksums import OF_ATTRIBUTES
from AutomaticEval.store.hdf5.contract import as_json, attribute_text
from AutomaticEval.store.hdf5.damage import verify_file
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.hdf5.write import Source, check_compression, write_file, write_run
from AutomaticEval.store.local_paths import LOCAL_PATHS
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.run_folder import (
    INDEX,
    LOCK,
    delete_replaced,
    is_finished,
    living,
    next_number,
    refuse_finished,
    set_aside,
    shard_names,
)

SHARD_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 4 * 2**30
MAX_SHARDS = 256
SMALL = 1 / 8
"""The part of a shard's size up to which it is merged with its neighbours when the run closes."""
SHARD_SECONDS = 300
"""A shard is sealed at this age, so that a process that is killed loses minutes at most."""


def shard_bytes_for(forecast_bytes: int) -> int:
    """The size of a shard with which a run has at most MAX_SHARDS, as far as memory allows."""
    return min(MAX_SHARD_BYTES, max(SHARD_BYTES, -(-forecast_bytes // MAX_SHARDS)))


class RunWriter:
    """Takes a run's samples. One shard is gathered while the one before it is written.

    Use it as a context manager: on every exit what was gathered is sealed, and the folder is given free.

        with RunWriter(folder, model, settings) as writer:
            writer.add(samples)
            writer.finish()

    resume: go on in a folder that a killed process left; `records()` tells what is there. Every byte of its shards is checked
    first; a shard that is damaged is set aside (`docs/format.md`), with a warning, and its samples are not among the records.
    Without it, a folder that holds a run is refused.
    strict: raise NotFinite once a shard is sealed that holds infinite numbers or NaN; without it, `finish` warns of them.
    finishing: the processes that wrote the folder have just closed it. No shard is read whole, none is set aside: damage raises.
    share: (rank, n_ranks) of several processes that write into one folder. The first opens it, and only then the others, with
    its `run_id` in their settings; when all have closed, it opens it again with finishing, and finishes.
    Raises FolderNotWritable, FolderInUse, PathExists, OtherSettings, DamagedFile.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        settings: Mapping[str, Any],
        *,
        shard_bytes: int = SHARD_BYTES,
        compression: str | None = None,
        strict: bool = False,
        resume: bool = False,
        finishing: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        check_compression(compression)
        self.folder = folder = folder.expanduser().absolute()
        self._model, self._shard_bytes, self._compression = attribute_text(model), shard_bytes, compression
        self._strict = strict
        self._settings = json.loads(as_json({"run_id": uuid4().hex, **settings}))
        self._kinds: dict[str, tuple[torch.dtype, int]] | None = None
        self._mutex = threading.RLock()
        self._gathered: list[Sample] = []
        self._blocks: set[int] = set()
        self._n_bytes = 0
        self._since = time.monotonic()
        self._sealed: list[Source] = []
        self._opened: dict[str, Shard] = {}
        self._rank, self._n_ranks = share
        self._next = self._rank
        self._n_samples = 0
        prepare_folder(folder)
        self._lock = locked(folder, self._rank)
        try:
            with named_failures(folder):
                self._begin(resume=resume, finishing=finishing)
        except BaseException:
            self._lock.release()
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sealing")
        self._sealing: Future[tuple[Source, int]] | None = None

    def _begin(self, *, resume: bool, finishing: bool) -> None:
        first = next_number(self.folder)
        self._next = first + (self._rank - first) % self._n_ranks
        if self._rank:
            return  # the first process has prepared the folder
        for left in _other_locks(self.folder):  # a process may have outlived the first
            lock = locked(self.folder, int(left.name.removeprefix(f"{LOCK}-")))
            left.unlink(missing_ok=True)
            lock.release()
        names = shard_names(self.folder)
        if not (resume or finishing) and (names or (self.folder / INDEX).exists()):
            raise StoreError(f"{self.folder} holds a run; choose another folder, or resume it.")
        refuse_finished(self.folder)
        if resume:
            self._set_aside_damaged(names)
        shards = [Shard(self.folder / name) for name in living(self.folder, shard_names(self.folder))]
        self._check_same(shards)
        (self.folder / INDEX).unlink(missing_ok=True)  # it was built over the shards of the unfinished run
        for shard in shards:
            self._sealed.append(source_of(shard))
            self._n_samples += shard.n_samples
            self._kinds = {key: (shard.dtypes[key], shard.extents[key].shape[1]) for key in shard.keys}
            self._refuse_non_finite(self._sealed[-1])

    def _set_aside_damaged(self, names: Sequence[str]) -> None:
        """Check every byte of what is there; before, whether it may be resumed at all."""
        opened: dict[str, Shard | None] = dict.fromkeys(names)
        for name in names:
            with suppress(NotActivations, TruncatedFile, DamagedFile):
                opened[name] = Shard(self.folder / name)
        self._check_same([shard for shard in opened.values() if shard is not None])
        for name, problem in damaged_among(self.folder, opened).items():
            told = f"{problem.removesuffix('.')}. It was set aside as {set_aside(self.folder / name)}; its samples are computed again."
            warnings.warn(told, UserWarning, stacklevel=5)

    def _check_same(self, shards: Sequence[Shard]) -> None:
        """Take their run_id. Raises OtherSettings when one was made with other settings."""
        if shards:
            self._settings["run_id"] = shards[0].settings.get("run_id")
        for shard in shards:
            found, wanted = {"model": shard.model, **shard.settings}, {"model": self._model, **self._settings}
            apart = differing(str(self.folder), found, wanted)
            if apart:
                raise OtherSettings(f"{self.folder} cannot be resumed: {'; '.join(map(str, apart))}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Seal what is gathered and give the folder free. failed: after an error, which is told; a shard that had failed before is warned of."""
        try:
            if failed:
                try:
                    self._settle()
                except AutomaticEvalError as before:
                    warnings.warn(str(before), UserWarning, stacklevel=3)
                with suppress(AutomaticEvalError):  # what was gathered may fit where the shard before did not
                    self.flush()
            else:
                self.flush()
        finally:
            self._thread.shutdown()
            self._lock.release()

    @property
    def run_id(self) -> str:
        """What the shards of one run, and only they, have in common."""
        return str(self._settings["run_id"])

    @property
    def n_samples(self) -> int:
        """Samples that are on the disk."""
        return self._n_samples

    @property
    def size_bytes(self) -> int:
        """Size of the sealed shards on the disk."""
        return sum(source.size_bytes for source in self._sealed)

    def add(self, samples: Sequence[Sample]) -> None:
        """Take samples, which may share rows; those of one call are in one shard.

        Waits when the shard before is still being written. Raises what stopped the writing: DiskFull, StoreError;
        CaptureError for rows that are not like those before, of which then none is taken.
        """
        with self._mutex:
            self._check_open()
            if self._sealing is not None and self._sealing.done():
                self._settle()
            self._check_kinds(samples)
            self._gathered.extend(samples)
            for sample in samples:
                self._n_bytes += sample.memory_bytes
                for part in sample.parts:
                    if id(part.rows) not in self._blocks:
                        self._blocks.add(id(part.rows))
                        self._n_bytes += part.rows.memory_bytes
            if self._n_bytes >= self._shard_bytes or time.monotonic() - self._since > SHARD_SECONDS:
                self.seal()

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise StoreError(f"the writer of {self.folder} was closed; nothing more can be added.")

    def _check_kinds(self, samples: Sequence[Sample]) -> None:
        """Raises CaptureError for what could not be sealed together with the rest."""
        in_8_bits = self._settings.get("store_dtype") == "int8"
        for rows in {id(part.rows): part.rows for sample in samples for part in sample.parts}.values():
            found = {
                key: (torch.int8 if in_8_bits else each.dtype, each.shape[1]) for key, each in rows.activations.items()
            }
            self._kinds = self._kinds or found
            if found != self._kinds:
                raise CaptureError(
                    "these rows have not the sites, dtypes or widths of the run's others; none was taken."
                )
            for key, each in rows.activations.items() if in_8_bits else ():
                if not each.isfinite().all():
                    raise CaptureError(
                        f"{key} holds values that are infinite or not a number, which int8 cannot hold; use bfloat16."
                    )

    def seal(self) -> None:
        """Have what is gathered written as the next shard."""
        with self._mutex:
            if not self._gathered:
                return
            self._settle()
            self._sealing = self._thread.submit(self._write, self._take_name(), self._gathered)
            self._gathered, self._blocks, self._n_bytes, self._since = [], set(), 0, time.monotonic()

    def flush(self) -> None:
        """Seal what is gathered, and return when it is on the disk."""
        with self._mutex:
            self._settle()
            self.seal()
            self._settle()

    def _settle(self) -> None:
        """Wait for the shard that is being written. A shard that failed is told once."""
        if self._sealing is None:
            return
        failure = self._sealing.exception()  # waits; Ctrl-C meanwhile must not forget it
        sealing, self._sealing = self._sealing, None
        if failure is not None:
            raise failure
        source, n_samples = sealing.result()
        self._sealed.append(source)
        self._n_samples += n_samples
        self._refuse_non_finite(source)

    def _refuse_non_finite(self, source: Source) -> None:
        if self._strict:
            say_non_finite(self.folder / source.name, source.non_finite, strict=True)

    def _take_name(self) -> str:
        self._next += self._n_ranks
        return f"shard-{self._next - self._n_ranks:05d}.h5"

    def _write(self, name: str, samples: Sequence[Sample]) -> tuple[Source, int]:
        in_8_bits = self._settings.get("store_dtype") == "int8"
        held = of_samples(samples, self._model, self._settings, in_8_bits=in_8_bits)
        return self._write_contents(name, held), len(samples)

    def _write_contents(self, name: str, held: Contents, replaces: Sequence[str] = ()) -> Source:
        return write_file(self.folder / name, held, compression=self._compression, replaces=replaces)

    def records(self) -> list[dict[str, Any]]:
        """`table()`, one dict a sample."""
        return records_of(self.table())

    def table(self) -> Columns:
        """The columns of every sealed sample, with its shard and index, read when they are asked for. Seals what is gathered; merges small shards."""
        self.flush()
        self._merge_small()
        return Placed(self._shards())

    def _shards(self) -> list[Shard]:
        for source in self._sealed:
            if source.name not in self._opened:
                self._opened[source.name] = Shard(self.folder / source.name)
        return [self._opened[source.name] for source in self._sealed]

    def _merge_small(self) -> None:
        """Write neighbours that fit into one shard as one; the old ones stay until `run.h5` is there."""
        merged = []
        for group in _groups(self._sealed, self._shard_bytes, shutil.disk_usage(self.folder).free):
            if len(group) == 1:
                merged += group
                continue
            parts = [Shard(self.folder / source.name).contents() for source in group]
            names = [source.name for source in group]
            merged.append(self._write_contents(self._take_name(), joined(parts), names))
        self._sealed = merged

    def finish(self, columns: Columns | None = None) -> None:
        """Write `run.h5`: these columns, in the order wanted, with what the evaluation said of each sample; None: as `table()`."""
        with self._mutex:
            self._check_open()
            if is_finished(self.folder):
                raise StoreError(f"{self.folder} is finished already.")
            columns = columns or self.table()
            n_records = len(columns.whole("shard")) if columns.names else 0
            if self._gathered or self._sealing is not None or n_records != self._n_samples:
                raise StoreError(
                    f"{n_records} records for {self._n_samples} sealed samples; ask table() after the last add."
                )
            counts = write_index(self.folder, self._sealed, self._shards(), columns, finished=True)
            if len(shard_names(self.folder)) > len(self._sealed):  # some were merged
                delete_replaced(self.folder)
            say_non_finite(self.folder, counts)


def locked(folder: Path, rank: int = 0) -> FileLock:
    """The lock of a folder, held: one for each process that shares it. Raises FolderInUse."""
    lock = FileLock(folder / (f"{LOCK}-{rank}" if rank else LOCK), timeout=0, thread_local=False)
    try:
        with named_failures(folder):
            lock.acquire()
    except Timeout:
        raise FolderInUse(f"another process is writing into {folder}; wait for it, or choose another folder.") from None
    return lock


def _other_locks(folder: Path) -> list[Path]:
    """The locks of the processes but the first that shared a run."""
    return [path for path in folder.glob(f"{LOCK}-*") if path.name.removeprefix(f"{LOCK}-").isdecimal()]


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """A folder goes again after a failure before the first shard, when nothing of a run is in it."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            clear_leftovers(folder)
            if {path.name for path in folder.iterdir()} <= {LOCK, LOCAL_PATHS}:
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        raise


def damaged_among(folder: Path, opened: Mapping[str, Shard | None]) -> dict[str, str]:
    """Shards of which something is wrong, and what; all bytes are read, but of those that a sound one replaces.

    opened: the shards of a folder by their names; None for one that cannot be opened.
    """
    found: dict[str, str] = {}
    replaced: set[str] = set()
    for name, shard in reversed(list(opened.items())):  # what replaces others comes after them
        if name in replaced:
            continue
        try:
            problems = verify_file(folder / name)
        except NotActivations as failure:
            problems = [str(failure)]
        if problems:
            found[name] = problems[0]
        elif shard is not None:
            replaced.update(shard.replaces)
    return found


def source_of(shard: Shard) -> Source:
    return Source(
        shard.path.name, shard.n_rows, shard.size_bytes, shard.attributes.get(OF_ATTRIBUTES, ""), shard.non_finite
    )


def _groups(sources: Sequence[Source], shard_bytes: int, free_bytes: int) -> list[list[Source]]:
    """Small neighbours that together are no larger than a shard, and for which the disk has room beside the old ones."""
    groups: list[list[Source]] = []
    is_open = False
    for source in sources:
        is_small = source.size_bytes <= shard_bytes * SMALL
        room = min(shard_bytes, free_bytes / 4)
        if is_open and is_small and sum(each.size_bytes for each in groups[-1]) + source.size_bytes <= room:
            groups[-1].append(source)
        else:
            groups.append([source])
        is_open = is_small
    return groups


class Placed:
    """The sample table over several shards, with each sample's shard and index; a column is read when it is asked for."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards

    @property
    def names(self) -> list[str]:
        return [*dict.fromkeys(name for shard in self._shards for name in shard.column_names), "shard", "index"]

    def whole(self, name: str) -> list[Any]:
        if name == "shard":
            return [number for number, shard in enumerate(self._shards) for _ in range(shard.n_samples)]
        if name == "index":
            return [index for shard in self._shards for index in range(shard.n_samples)]
        return [value for shard in self._shards for value in shard.column(name)]

    def record(self, index: int) -> dict[str, Any]:
        return {name: self.whole(name)[index] for name in self.names}


def write_index(
    folder: Path, sources: Sequence[Source], shards: Sequence[Shard], columns: Columns, *, finished: bool
) -> dict[str, int]:
    """Write `run.h5` over shards. columns: of each sample, in the order wanted, with its shard and index. Returns what `write_run` does."""
    if not shards:
        raise StoreError(f"{folder} holds no shard: nothing was captured.")
    parts = [replace(shard.contents(), columns=Listed({})) for shard in shards]  # the table has the columns
    held = reordered(joined(parts, shards[0].settings), order_of(parts, columns), columns)
    return write_run(folder / INDEX, held, sources, finished=finished)


def order_of(parts: Sequence[Contents], columns: Columns) -> Array:
    """The number of each line of a table among the samples of all parts, by its shard and index. Raises ValueError for a line of none."""
    n_samples = np.array([0, *(part.n_samples for part in parts)])
    shard, index = (
        np.array([-1 if value is None else value for value in columns.whole(name)], dtype=np.int64)
        for name in ("shard", "index")
    )
    known = (shard >= 0) & (shard < len(parts)) & (index >= 0)
    strays = np.flatnonzero(~known | (index >= n_samples[np.where(known, shard + 1, 0)]))
    if len(strays):
        raise ValueError(f"sample {strays[0]} is in no shard")
    found: Array = np.cumsum(n_samples)[shard] + index
    return found

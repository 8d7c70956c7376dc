"""Writes a run: samples gathered in memory, sealed into shards by a thread of their own, and one `run.h5` over them.

No HDF5 file is open while a model runs but the one that is being sealed. Whatever kills the process, every file that has its
name is whole, and a writer that resumes goes on from there. Knows nothing of where samples come from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout

from AutomaticEval.errors import AutomaticEvalError, FolderInUse, OtherSettings, StoreError
from AutomaticEval.store import contents
from AutomaticEval.store.contents import Columns, Contents, Listed
from AutomaticEval.store.files import named_failures, prepare_folder
from AutomaticEval.store.format import Sample
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.sealing import Source, check_compression, write_file, write_run
from AutomaticEval.store.shard import Shard

SHARD_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 4 * 2**30
MAX_SHARDS = 256
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

    resume: go on in a folder that a killed process left; `records()` tells what is there. Without it, a folder that
    holds a run is refused.
    Raises FolderNotWritable, FolderInUse, PathExists, OtherSettings.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        settings: Mapping[str, Any],
        *,
        shard_bytes: int = SHARD_BYTES,
        compression: str | None = None,
        resume: bool = False,
    ) -> None:
        check_compression(compression)
        self.folder = folder
        self._model, self._shard_bytes, self._compression = model, shard_bytes, compression
        self._settings = json.loads(json.dumps({**settings, "run_id": uuid4().hex}, default=str))
        self._gathered: list[Sample] = []
        self._blocks: dict[int, int] = {}
        self._since = time.monotonic()
        self._sealed: list[Source] = []
        self._opened: dict[str, Shard] = {}
        self._next = 0
        self._n_samples = 0
        prepare_folder(folder)
        self._lock = locked(folder)
        try:
            self._begin(resume=resume)
        except BaseException:
            self._lock.release()
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sealing")
        self._sealing: Future[Source] | None = None

    def _begin(self, *, resume: bool) -> None:
        found = shard_names(self.folder)
        if not resume and (found or (self.folder / "run.h5").exists()):
            raise StoreError(f"{self.folder} holds a run; choose another folder, or resume it.")
        for left in self.folder.glob(".*.partial"):
            left.unlink()
        self._next = max((int(name[6:-3]) + 1 for name in found), default=0)
        shards = [Shard(self.folder / name) for name in living(self.folder, found)]
        for shard in shards:
            self._settings["run_id"] = shard.settings.get("run_id")
            _check_same(shard, self._model, self._settings)
            self._sealed.append(Source(shard.path.name, shard.n_rows, shard.size_bytes))
            self._n_samples += shard.n_samples

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Seal what is gathered and give the folder free. failed: after an error, which is the one that is told."""
        try:
            if failed:
                for step in (self._settle, self.flush):  # what was gathered may fit where the shard before did not
                    with suppress(AutomaticEvalError):
                        step()
            else:
                self.flush()
        finally:
            self._thread.shutdown()
            self._lock.release()

    @property
    def n_samples(self) -> int:
        """Samples that are sealed or being sealed."""
        return self._n_samples

    @property
    def size_bytes(self) -> int:
        """Size of the sealed shards on the disk."""
        return sum(source.size_bytes for source in self._sealed)

    def add(self, samples: Sequence[Sample]) -> None:
        """Take samples, which may share rows; those of one call are in one shard.

        Waits when the shard before is still being written. Raises what stopped the writing: DiskFull, StoreError.
        """
        if self._sealing is not None and self._sealing.done():
            self._settle()
        self._gathered.extend(samples)
        self._blocks.update((id(part.rows), part.rows.size_bytes) for sample in samples for part in sample.parts)
        if sum(self._blocks.values()) >= self._shard_bytes or time.monotonic() - self._since > SHARD_SECONDS:
            self.seal()

    def seal(self) -> None:
        """Have what is gathered written as the next shard."""
        if not self._gathered:
            return
        self._settle()
        samples, self._gathered, self._blocks, self._since = self._gathered, [], {}, time.monotonic()
        self._n_samples += len(samples)
        self._sealing = self._thread.submit(self._write, self._take_name(), samples)

    def flush(self) -> None:
        """Seal what is gathered, and return when it is on the disk."""
        self._settle()
        self.seal()
        self._settle()

    def _settle(self) -> None:
        """Wait for the shard that is being written."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            self._sealed.append(sealing.result())

    def _take_name(self) -> str:
        self._next += 1
        return f"shard-{self._next - 1:05d}.h5"

    def _write(self, name: str, samples: Sequence[Sample]) -> Source:
        in_8_bits = self._settings.get("store_dtype") == "int8"
        return self._write_contents(
            name, contents.of_samples(samples, self._model, self._settings, in_8_bits=in_8_bits)
        )

    def _write_contents(self, name: str, held: Contents, replaces: Sequence[str] = ()) -> Source:
        path = self.folder / name
        write_file(path, held, compression=self._compression, replaces=replaces)
        return Source(name, held.n_rows, path.stat().st_size)

    def records(self) -> list[dict[str, Any]]:
        """The columns of every sealed sample, with its shard and index. Seals what is gathered; merges small shards."""
        return contents.records_of(self._table())

    def _table(self) -> Listed:
        self.flush()
        self._merge_small()
        return placed([shard.contents() for shard in self._shards()])

    def _shards(self) -> list[Shard]:
        for source in self._sealed:
            if source.name not in self._opened:
                self._opened[source.name] = Shard(self.folder / source.name)
        return [self._opened[source.name] for source in self._sealed]

    def _merge_small(self) -> None:
        """Write neighbours that fit into one shard as one; the old ones stay until `run.h5` is there."""
        merged = []
        for group in _groups(self._sealed, self._shard_bytes):
            if len(group) == 1:
                merged += group
                continue
            parts = [Shard(self.folder / source.name).contents() for source in group]
            names = [source.name for source in group]
            merged.append(self._write_contents(self._take_name(), contents.joined(parts), names))
        self._sealed = merged

    def finish(self, records: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Write `run.h5`: these records, one a sample, with what the evaluation said of each; None: as `records()`."""
        columns = self._table() if records is None else Listed.of(records)
        write_index(self.folder, self._sealed, self._shards(), columns, finished=True)
        kept = {source.name for source in self._sealed}
        for name in shard_names(self.folder):
            if name not in kept:  # merged into another one
                (self.folder / name).unlink()


def locked(folder: Path) -> FileLock:
    """The lock of a folder, held. Raises FolderInUse."""
    lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
    try:
        with named_failures(folder):
            lock.acquire()
    except Timeout:
        raise FolderInUse(f"another process is writing into {folder}; wait for it, or choose another folder.") from None
    return lock


def _check_same(shard: Shard, model: str, settings: Mapping[str, Any]) -> None:
    """Raises OtherSettings when a shard was made with other ones."""
    found, wanted = ({"model": name, **each} for name, each in ((shard.model, shard.settings), (model, settings)))
    differing = [
        f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise OtherSettings(f"{shard.path.parent} cannot be resumed: {'; '.join(differing)}.")


def shard_names(folder: Path) -> list[str]:
    """The shards that are in a folder, in order."""
    return sorted(
        (path.name for path in folder.glob("shard-*.h5") if path.stem[6:].isdigit()), key=lambda n: int(n[6:-3])
    )


def living(folder: Path, names: Sequence[str]) -> list[str]:
    """Without those that another one replaces: a process was killed before it could delete them."""
    replaced = {
        old
        for name in names
        for old in json.loads(Shard(folder / name).attributes.get("replaces", "[]"))
        if isinstance(old, str)
    }
    return [name for name in names if name not in replaced]


def _groups(sources: Sequence[Source], size_bytes: int) -> list[list[Source]]:
    """Neighbours that together are no larger than a shard."""
    groups: list[list[Source]] = []
    for source in sources:
        if groups and sum(each.size_bytes for each in groups[-1]) + source.size_bytes <= size_bytes:
            groups[-1].append(source)
        else:
            groups.append([source])
    return groups


def placed(parts: Sequence[Contents]) -> Listed:
    """The sample table over several shards, with each sample's shard and index."""
    columns = dict(contents.joined_columns(parts).columns)
    columns["shard"] = [number for number, part in enumerate(parts) for _ in range(part.n_samples)]
    columns["index"] = [index for part in parts for index in range(part.n_samples)]
    return Listed(columns)


def write_index(
    folder: Path, sources: Sequence[Source], shards: Sequence[Shard], columns: Columns, *, finished: bool
) -> None:
    """Write `run.h5` over shards. columns: of each sample, in the order wanted, with its shard and index."""
    if not shards:
        raise StoreError(f"{folder} holds no shard: nothing was captured.")
    parts = [replace(shard.contents(), columns=Listed({})) for shard in shards]  # the table has the columns
    held = contents.reordered(contents.joined(parts, shards[0].settings), order_of(parts, columns), columns)
    write_run(folder / "run.h5", held, sources, finished=finished)


def order_of(parts: Sequence[Contents], columns: Columns) -> Array:
    """The number of each line of a table among the samples of all parts, by its shard and index."""
    first = np.cumsum([0, *(part.n_samples for part in parts)])
    found: Array = first[columns.whole("shard")] + np.array(columns.whole("index"), dtype=np.int64)
    return found

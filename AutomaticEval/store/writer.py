"""Writes a run: samples gathered in memory, sealed into shards by threads of their own, and one `run.h5` over them.

No HDF5 file is open while a model runs but the one that is being filled. Whatever kills the process, every file that has its
name is whole, and a writer that resumes goes on from there. Knows nothing of where samples come from.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from AutomaticEval.errors import (
    AutomaticEvalError,
    StoreError,
    warn,
)
from AutomaticEval.samples import Sample
from AutomaticEval.settings import RunSettings
from AutomaticEval.store.contents.columns import Columns, records_of
from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.disk.json_text import as_json
from AutomaticEval.store.disk.whole_files import named_failures, prepare_folder
from AutomaticEval.store.finite import report_non_finite
from AutomaticEval.store.hdf5.attributes import attribute_text
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.hdf5.write import check_compression, filled_file, write_file
from AutomaticEval.store.hdf5.writing.activations import Source
from AutomaticEval.store.run_folder import delete_replaced, is_finished, next_number, shard_names
from AutomaticEval.store.shard_columns import ShardColumns
from AutomaticEval.store.writing.folder_lock import clear_other_ranks, locked
from AutomaticEval.store.writing.gathered_samples import GatheredSamples
from AutomaticEval.store.writing.run_index import source_of, write_index
from AutomaticEval.store.writing.shards_in_flight import MOST, ShardsInFlight
from AutomaticEval.store.writing.small_shards import groups_to_merge
from AutomaticEval.store.writing.unfinished_run import take_up_shards

SHARD_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 4 * 2**30
MAX_SHARDS = 256
SHARD_SECONDS = 300
"""A shard is sealed at this age, so that a process that is killed loses minutes at most."""


def shard_bytes_for(forecast_bytes: int) -> int:
    """The size of a shard with which a run has at most MAX_SHARDS, as far as memory allows."""
    return min(MAX_SHARD_BYTES, max(SHARD_BYTES, -(-forecast_bytes // MAX_SHARDS)))


class RunWriter:
    """Takes a run's samples. One shard is gathered while the one before it is filled, and the disk settles the one before that.

    The rows of two shards are in memory at most: of the one that is gathered, and of the one that is filled.

    Use it as a context manager: on every exit what was gathered is sealed, and the folder's lock is released.

        with RunWriter(folder, model, settings) as writer:
            writer.add(samples)
            writer.finish()

    resume: go on in a folder that a killed process left; `records()` tells what is there. Every byte of its shards is checked
    first. A damaged shard is set aside (`docs/format.md`), with a warning, and its samples are not among the records.
    Without resume, a folder that holds a run is refused.
    strict: raise NotFinite once a shard is sealed that holds infinite numbers or NaN; without it, `finish` warns of them.
    matrices: those of the projection by which the rows were made, name -> [width, k]; each file holds them.
    finishing: the processes that wrote the folder have just closed it. No shard is read whole, none is set aside: damage raises.
    share: (rank, n_ranks) of several processes that write into one folder. The first opens it, and only then the others, with
    its `run_id` in their settings. When all have closed it, the first opens it again with finishing, and finishes.
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
        matrices: Mapping[str, Any] = {},
        resume: bool = False,
        finishing: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        check_compression(compression)
        self.folder = folder = folder.expanduser().absolute()
        self._model, self._shard_bytes, self._compression = attribute_text(model), shard_bytes, compression
        self._strict, self._matrices = strict, matrices
        self._settings = RunSettings.from_dict(json.loads(as_json({"run_id": uuid4().hex, **settings})))
        self._in_8_bits = self._settings.store_dtype == "int8"
        self._gathered = GatheredSamples(in_8_bits=self._in_8_bits)
        self._mutex = threading.RLock()
        self._sealed: list[Source] = []
        self._opened: dict[str, Shard] = {}
        self._n_samples = 0
        self._rank, self._n_ranks = share
        prepare_folder(folder)
        self._lock = locked(folder, self._rank)
        try:
            with named_failures(folder):
                self._begin(resume=resume, finishing=finishing)
        except BaseException:
            self._lock.release()
            raise
        self._in_flight = ShardsInFlight()

    def _begin(self, *, resume: bool, finishing: bool) -> None:
        lowest = next_number(self.folder)
        self._next = lowest + (self._rank - lowest) % self._n_ranks
        if self._rank:
            return  # the first process has prepared the folder
        clear_other_ranks(self.folder)
        described = {"model": self._model, **self._settings.as_dict()}
        for shard in take_up_shards(self.folder, described, resume=resume, finishing=finishing):
            self._settings = self._settings.changed(run_id=shard.made_with.run_id)
            self._gathered.formats = shard.row_formats
            self._note_sealed(source_of(shard), shard.n_samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Seal what is gathered and release the folder's lock.

        failed: an error is on its way to the user. A shard that could not be written before is then told in a warning.
        """
        try:
            if failed:
                self._settle_with_warnings()
                with suppress(AutomaticEvalError):  # what was gathered may fit where the shard before did not
                    self.flush()
            else:
                self.flush()
        finally:
            try:
                self._settle_with_warnings()
            finally:
                self._in_flight.wait_until_ended()
                self._lock.release()

    def _settle_with_warnings(self) -> None:
        """Wait for the shards that are being written, and tell in warnings which failed: another error is on its way to the user."""
        while len(self._in_flight):
            try:
                self._take_first()
            except AutomaticEvalError as before:
                warn(str(before))

    @property
    def run_id(self) -> str:
        """The identifier that all shards of one run have, and no others."""
        return str(self._settings.run_id)

    @property
    def n_samples(self) -> int:
        """Number of samples that are on the disk."""
        return self._n_samples

    @property
    def size_bytes(self) -> int:
        """Size of the sealed shards on the disk."""
        return sum(source.size_bytes for source in self._sealed)

    def add(self, samples: Sequence[Sample]) -> None:
        """Take samples, which may share rows; those of one call are in one shard.

        Waits when a shard is full and the one before is still being filled. Raises what stopped the writing: DiskFull, StoreError;
        CaptureError for rows that are not like those before, of which then none is taken.
        """
        with self._mutex:
            self._check_open()
            self._take_ended()
            self._gathered.add(samples)
            if self._gathered.n_bytes >= self._shard_bytes or self._gathered.age_seconds > SHARD_SECONDS:
                self.seal()

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise StoreError(f"the writer of {self.folder} was closed; nothing more can be added.")

    def seal(self) -> None:
        """Start to write what is gathered as the next shard, once the rows of the shard before are in its file."""
        with self._mutex:
            if len(self._gathered):
                while len(self._in_flight) >= MOST:
                    self._take_first()
                self._in_flight.wait_until_filled()
                self._take_ended()
                samples = self._gathered.samples
                self._in_flight.start(partial(self._filled, self._take_name(), samples), len(samples))
                self._gathered.clear()  # only now: when no thread can be started, nothing is lost

    def flush(self) -> None:
        """Seal what is gathered, and return when all is on the disk."""
        with self._mutex:
            self._take_ended()
            self.seal()
            while len(self._in_flight):
                self._take_first()

    def _take_ended(self) -> None:
        while self._in_flight.first_has_ended:
            self._take_first()

    def _take_first(self) -> None:
        """Wait for the shard that was started first. A shard that failed raises once."""
        sealed = self._in_flight.take()
        self._note_sealed(sealed.source, sealed.n_samples)

    def _note_sealed(self, source: Source, n_samples: int) -> None:
        self._sealed.append(source)
        self._n_samples += n_samples
        if self._strict:
            report_non_finite(self.folder / source.name, source.non_finite, strict=True)

    def _take_name(self) -> str:
        self._next += self._n_ranks
        return f"shard-{self._next - self._n_ranks:05d}.h5"

    def _filled(self, name: str, samples: Sequence[Sample]) -> AbstractContextManager[Source]:
        how: dict[str, Any] = {"in_8_bits": self._in_8_bits, "matrices": self._matrices}
        contents = of_samples(samples, self._model, self._settings.as_dict(), **how)
        return filled_file(self.folder / name, contents, compression=self._compression)

    def records(self) -> list[dict[str, Any]]:
        """`table()` as one dict a sample."""
        return records_of(self.table())

    def table(self) -> Columns:
        """The columns of every sealed sample, with its shard and index, read when they are asked for. Seals what is gathered; merges small shards."""
        with self._mutex:
            self._take_ended()
            self.seal()
            while len(self._in_flight):
                self._shards()  # those before are opened while the disk settles the next
                self._take_first()
        self._merge_small()
        return ShardColumns(self._shards())

    def _shards(self) -> list[Shard]:
        for source in self._sealed:
            if source.name not in self._opened:
                self._opened[source.name] = Shard(self.folder / source.name)
        return [self._opened[source.name] for source in self._sealed]

    def _merge_small(self) -> None:
        """Write small neighbours as one shard; the old ones stay until `run.h5` is there."""
        merged = []
        for group in groups_to_merge(self._sealed, self._shard_bytes, shutil.disk_usage(self.folder).free):
            if len(group) == 1:
                merged += group
                continue
            files = [Shard(self.folder / source.name).contents() for source in group]
            path, replaced = self.folder / self._take_name(), [source.name for source in group]
            merged.append(write_file(path, joined(files), compression=self._compression, replaces=replaced))
        self._sealed = merged

    def finish(self, columns: Columns | None = None) -> None:
        """Write `run.h5`. columns: the sample table in the order wanted, with each sample's score, shard and index; None: `table()`.

        Raises StoreError when the run is finished already, or when columns do not have every sealed sample.
        """
        with self._mutex:
            self._check_open()
            if is_finished(self.folder):
                raise StoreError(f"{self.folder} is finished already.")
            columns = columns or self.table()
            n_records = len(columns.whole("shard")) if columns.names else 0
            if len(self._gathered) or len(self._in_flight) or n_records != self._n_samples:
                raise StoreError(
                    f"{n_records} records for {self._n_samples} sealed samples; ask table() after the last add."
                )
            counts = write_index(self.folder, self._sealed, self._shards(), columns, finished=True)
            if len(shard_names(self.folder)) > len(self._sealed):  # some were merged
                delete_replaced(self.folder)
            report_non_finite(self.folder, counts)

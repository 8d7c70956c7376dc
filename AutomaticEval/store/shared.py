"""A run folder into which several processes write: the first opens it, then the others. When all have closed it, the first finishes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from AutomaticEval.processes import Ranks
from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.local_paths import forget_asked, write_asked, write_local_paths
from AutomaticEval.store.run_folder import leaving_nothing
from AutomaticEval.store.writer import RunWriter

T = TypeVar("T")


@dataclass(frozen=True)
class SharedRun:
    """A run that one or more processes write, and how they write it."""

    model: str
    settings: Mapping[str, Any]
    shard_bytes: int
    compression: str | None
    strict: bool
    """Whether to stop at numbers that are infinite or NaN."""

    ranks: Ranks
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where the model is on this machine, for `local_paths.json`."""

    matrices: Mapping[str, Any] = field(default_factory=dict)
    """Those of the projection by which the rows were made: name -> [width, k]."""

    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the run is asked for, for `asked.json`."""

    @contextmanager
    def writing(
        self, new_folder: Callable[[], Path], *, resume: bool, tell: Callable[[RunWriter], T]
    ) -> Iterator[tuple[RunWriter, Path, T]]:
        """Opens the run in every process: (this process's writer, the folder, what `tell` returned). Every exit seals what was gathered.

        new_folder: makes the folder, and is called in the first process only. tell: is called with the first process's writer, to say what is
        on the disk already; every process gets what it returned.
        """
        opened, shared = None, None
        if self.ranks.is_first:
            folder = new_folder()
            with nullcontext() if resume else leaving_nothing(folder):
                opened, answer = self._open_first(folder, tell, resume=resume)
                if not opened.n_samples:  # what a killed process wrote of itself
                    forget_asked(folder)
                write_local_paths(folder, self.paths)
                write_asked(folder, self.asked)
            shared = (folder, {**self.settings, "run_id": opened.run_id}, answer)
        folder, settings, answer = self.ranks.from_first(shared)
        share = (self.ranks.rank, self.ranks.n_ranks)
        with opened or self._writer(folder, settings, share=share) as writer:
            yield writer, folder, answer

    def _open_first(self, folder: Path, tell: Callable[[RunWriter], T], *, resume: bool) -> tuple[RunWriter, T]:
        writer = self._writer(folder, self.settings, resume=resume, share=(0, self.ranks.n_ranks))
        try:
            return writer, tell(writer)
        except BaseException:
            writer.close(failed=True)
            raise

    def finish(self, folder: Path, columns_of: Callable[[Columns], Columns]) -> tuple[int, int] | None:
        """Wait until all processes have closed the run, and write `run.h5` over all samples in the first one.

        columns_of: makes the sample table that is written of the one that was sealed.
        Returns the number of samples and of bytes; None in the other processes.
        """
        self.ranks.gathered(None)  # all have sealed
        if not self.ranks.is_first:
            return None
        with self._writer(folder, self.settings, finishing=True) as writer:
            writer.finish(columns_of(writer.table()))
            forget_asked(folder)
            return writer.n_samples, writer.size_bytes

    def _writer(self, folder: Path, settings: Mapping[str, Any], **how: Any) -> RunWriter:
        return RunWriter(
            folder,
            self.model,
            settings,
            shard_bytes=self.shard_bytes,
            compression=self.compression,
            strict=self.strict,
            matrices=self.matrices,
            **how,
        )

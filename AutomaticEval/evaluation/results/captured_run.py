"""The folder of a benchmark run: opened, shared by the run's processes, resumed, and finished with what lm-eval said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval

from AutomaticEval.errors import BenchmarkError, StoreError
from AutomaticEval.evaluation.results.join import Directions, join
from AutomaticEval.evaluation.results.repeats import Verdicts
from AutomaticEval.evaluation.results.requests import Answered, RequestKey, answered_in
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.processes import Ranks
from AutomaticEval.selection import Selection
from AutomaticEval.store.contents.columns import Columns, Listed, records_of
from AutomaticEval.store.disk.file_names import own_name, plain_name
from AutomaticEval.store.disk.whole_files import named_failures, prepare_folder
from AutomaticEval.store.run_folder import LOCK, is_finished, refuse_finished
from AutomaticEval.store.shared import SharedRun
from AutomaticEval.store.run_folder import leaving_nothing
from AutomaticEval.store.writer import RunWriter


@dataclass(frozen=True)
class Keeping:
    """Where what is captured goes."""

    save_dir: Path = Path("activations")
    """The run folder is made in it."""

    resume: Path | None = None
    """A run folder that a process left when it was killed, to go on in."""

    compression: str | None = None
    """zstd, lz4 or gzip for the activations on the disk; None writes them as they are."""

    strict: bool = False
    """Stop once numbers are stored that are infinite or NaN; without it they are counted, and said at the end."""

    def __post_init__(self) -> None:
        if self.resume is None:
            return
        with named_failures(self.resume):
            is_folder = self.resume.is_dir()
        if not is_folder:
            raise StoreError(f"{self.resume} is no folder; resume needs the run folder that is to go on.")
        if not (self.resume / LOCK).exists():
            raise StoreError(f"{self.resume} holds no run that was cut short; resume needs the run folder itself.")
        refuse_finished(self.resume)


class Opened(NamedTuple):
    """A run folder that is being written."""

    writer: RunWriter
    answered: dict[RequestKey, Answered]
    """The requests that are on the disk already."""


@dataclass
class RunFolder:
    """Where one run goes, and what it is made with."""

    keeping: Keeping
    name: str
    """What the name of a new folder begins with: `<name>_<timestamp>`."""

    model: str
    settings: Mapping[str, Any]
    shard_bytes: int
    ranks: Ranks
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where the model is on this machine."""

    path: Path | None = None
    """Known once it is open."""

    n_samples: int = 0
    size_bytes: int = 0
    n_truncated: int = 0
    """Samples whose prompt was cut on the left to fit the context."""

    @contextmanager
    def writing(self) -> Iterator[Opened]:
        """Open the folder in every process of the run; on every exit what was captured is sealed."""
        resume = self.keeping.resume
        run = self._shared.writing(
            lambda: resume or new_folder(self.keeping.save_dir, self.name),
            resume=resume is not None,
            tell=lambda writer: answered_in(writer.records()) if resume else {},
        )
        writer: RunWriter | None = None
        try:
            with ExitStack() as left, run as (writer, folder, answered):
                if not resume and self.ranks.n_ranks == 1:  # others may have rows still
                    left.enter_context(leaving_nothing(folder))
                self.path = folder
                yield Opened(writer, answered)
        finally:
            self.n_samples = 0 if writer is None else writer.n_samples

    @property
    def _shared(self) -> SharedRun:
        return SharedRun(
            self.model,
            self.settings,
            self.shard_bytes,
            self.keeping.compression,
            self.keeping.strict,
            self.ranks,
            self.paths,
        )

    @property
    def is_finished(self) -> bool:
        return self.path is not None and is_finished(self.path)

    def finish(
        self,
        samples: Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        repeats: Verdicts | None = None,
        doc_ids: Mapping[str, Sequence[int]] | None = None,
        directions: Directions | None = None,
    ) -> None:
        """Join every sample of every process to what lm-eval logged of it, and write `run.h5`.

        doc_ids: task -> the documents' own indices, when the samples count within them. directions: of the tasks' metrics.
        """

        def joined(columns: Columns) -> Columns:
            records = records_of(columns)
            self.n_truncated = sum((record["n_truncated"] or 0) > 0 for record in records)
            unknown = sorted({record["task"] for record in records} - set(samples))
            if unknown:
                raise BenchmarkError(
                    f"{', '.join(unknown)} was captured, and is not in these results: one instance makes one run of one evaluation."
                )
            for record in records if doc_ids else ():
                record["doc_id"] = (doc_ids or {})[record["task"]][record["doc_id"]]
            return Listed.of(join(records, samples, repeats, directions))

        assert self.path is not None
        done = self._shared.finish(self.path, joined)
        if done is not None:
            self.n_samples, self.size_bytes = done


def made_with(loaded: LoadedModel, selection: Selection) -> dict[str, Any]:
    """The settings that decide a run's numbers."""
    made = loaded.made_with()
    return {**made, "versions": {**made["versions"], "lm_eval": lm_eval.__version__}, **selection.as_dict()}


def new_folder(save_dir: Path, name: str) -> Path:
    """A new folder `<name>_<timestamp>`."""
    prepare_folder(save_dir)
    stem = f"{name}_{datetime.now():%Y%m%d_%H%M%S}"
    number = 1
    while True:
        folder = save_dir / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def folder_name(benchmarks: Sequence[str], model: str) -> str:
    """`<benchmark>_<model>`, of characters that every file system takes."""
    return "_".join(own_name(plain_name(part), 80) for part in ("-".join(benchmarks), Path(model).name))

"""The folder of a benchmark run: how it is opened, shared by the run's processes, resumed, and finished with lm-eval's verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval

from AutomaticEval.errors import BenchmarkError
from AutomaticEval.evaluation.results.earlier_answers import EarlierAnswer, earlier_answers
from AutomaticEval.evaluation.results.join import Directions, join
from AutomaticEval.evaluation.results.repeats import Verdicts
from AutomaticEval.evaluation.results.request_key import RequestKey
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.processes import Ranks
from AutomaticEval.selection import Selection
from AutomaticEval.settings import RunSettings
from AutomaticEval.store.contents.columns import Columns, Listed, records_of
from AutomaticEval.store.disk.file_names import own_name, plain_name
from AutomaticEval.store.disk.whole_files import stamped_folder
from AutomaticEval.store.run_folder import is_finished, leaving_nothing
from AutomaticEval.store.shared import SharedRun
from AutomaticEval.store.writer import RunWriter
from AutomaticEval.store.writing.earlier_run import new_run_folder


class Opened(NamedTuple):
    """A run folder that is being written."""

    writer: RunWriter
    answered: dict[RequestKey, EarlierAnswer]
    """The requests whose answers are on the disk already."""


@dataclass
class RunFolder:
    """Where one run goes, and what it was made with. `writing` opens it, `finish` closes it."""

    output: RunOutput
    name: str
    """A new folder is called `<name>_<timestamp>`."""

    model: str
    settings: RunSettings
    shard_bytes: int
    ranks: Ranks
    paths: Mapping[str, str] = field(default_factory=dict)
    """model, peft and delta -> where they are on this machine, if they are folders."""

    matrices: Mapping[str, Any] = field(default_factory=dict)
    """Those of the projection by which the rows are made."""

    path: Path | None = None
    """The folder; None until it is open."""

    n_samples: int = 0
    size_bytes: int = 0
    n_truncated: int = 0
    """Samples whose prompt was cut on the left to fit the context."""

    @contextmanager
    def writing(self) -> Iterator[Opened]:
        """Open the folder, in every process of the run. On every exit what was captured is sealed."""
        resume = self.output.resume
        run = self._shared.writing(
            lambda: resume or _new_folder_of(self.output, self.name),
            resume=resume is not None,
            tell=lambda writer: earlier_answers(writer.records()) if resume else {},
        )
        writer: RunWriter | None = None
        try:
            with ExitStack() as left, run as (writer, folder, answered):
                if not resume and self.ranks.n_ranks == 1:  # other processes may still have rows
                    left.enter_context(leaving_nothing(folder))
                self.path = folder
                yield Opened(writer, answered)
        finally:
            self.n_samples = 0 if writer is None else writer.n_samples

    @property
    def _shared(self) -> SharedRun:
        return SharedRun(
            self.model,
            self.settings.as_dict(),
            self.shard_bytes,
            self.output.compression,
            self.output.strict,
            self.ranks,
            self.paths,
            self.matrices,
            self.output.asked,
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
        """Join the samples of all processes to what lm-eval logged of them, and write `run.h5`.

        samples: lm-eval's, by task. repeats: the verdict on each of several answers to one question. doc_ids: task -> the documents' own
        indices, when the captured samples count within these. directions: task -> metric -> whether higher is better.
        Raises BenchmarkError for captured tasks that are not among the samples, CaptureError for samples that do not fit.
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


def made_with(loaded: LoadedModel, selection: Selection) -> RunSettings:
    """The settings of a run that captures a selection: what decides its numbers."""
    made = loaded.made_with()
    versions = {**(made.versions or {}), "lm_eval": lm_eval.__version__}
    return made.changed(versions=versions, **selection.as_dict())


def _new_folder_of(output: RunOutput, name: str) -> Path:
    """The folder that was named, or a new one in `activation_save_dir`. Raises PathExists for one that is taken."""
    if output.output is None:
        return stamped_folder(output.activation_save_dir, name)
    return new_run_folder(output.output, output.overwrite)


def folder_name(benchmarks: Sequence[str], model: str) -> str:
    """`<benchmark>_<model>`, in characters that every file system takes."""
    return "_".join(own_name(plain_name(part), 80) for part in ("-".join(benchmarks), Path(model).name))

"""What a run is, in a few lines: what was run, how, what was kept, and how large it is. For a person at a terminal or in a notebook."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from AutomaticEval.settings import RunSettings
from AutomaticEval.sites import keys_text
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.disk.whole_files import size_text
from AutomaticEval.store.reading.reduced_runs import how_reduced
from AutomaticEval.store.run_folder import shard_names


class AnyRun(Protocol):
    """A run, as this module sees it: `store.run.Run`."""

    path: Path
    finished: bool

    @property
    def model(self) -> str: ...
    @property
    def created(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def made_with(self) -> RunSettings: ...
    @property
    def keys(self) -> list[str]: ...
    @property
    def contents(self) -> Contents: ...
    def column(self, name: str) -> list[Any]: ...
    def __len__(self) -> int: ...


class KeptEdit(NamedTuple):
    """One edit that a run was made with."""

    text: str
    """The edit in words."""

    value: Tensor | None
    """[n, width], float64: what it was made with. None when the file does not hold it."""

    def __repr__(self) -> str:
        kept = (
            "" if self.value is None else f", {list(self.value.shape)} {str(self.value.dtype).removeprefix('torch.')}"
        )
        return f"<edit: {self.text}{kept}>"


class TaskLine(NamedTuple):
    """One task of a run."""

    task: str
    """Empty for a run that is no benchmark's."""

    n_samples: int
    n_questions: int
    """Each of several sampled answers to a question counts."""
    correct: float | None
    """The share of the questions with a verdict that were answered rightly; None when no question has one."""

    means: Mapping[str, tuple[float, float | None]]
    """Metric -> its mean over the questions, and the standard error of that mean, which one question alone does not give."""

    of: str = "questions"
    """What n_questions counts; "texts" of an extraction."""

    @property
    def in_words(self) -> str:
        """In one line."""
        correct = "" if self.correct is None else f", {self.correct:.4f} correct"
        means = "".join(f", {name} {mean:.4f}" for name, (mean, _) in self.means.items())
        return f"{self.n_samples} samples of {self.n_questions} {self.of}{correct}{means}"


def facts_of(run: AnyRun) -> dict[str, str]:
    """What there is to say of a run as a whole: name -> text. What a run does not say is left out."""
    made = run.made_with
    about = {
        "model": _model(run.model, made),
        "revision": made.revision,
        "loaded with": _pairs(made.loaded_with),
        "date": run.created,
        "state": _state(run),
        "benchmark": _asked(made.benchmark),
        "texts": _pairs(made.corpus),
        "edits": _pairs(made.edits) or "none",
        "sites": made.sites,
        "layers": made.layers,
        "positions": made.positions,
        "stored": _stored(run),
        "reduced": _reduced(run),
        "answers": made.generation and f"generated ({made.generation})",
        "versions": _pairs(made.versions),
        "size": _size(run),
    }
    return {name: str(text) for name, text in about.items() if text}


def tasks_of(run: AnyRun) -> list[TaskLine]:
    """The tasks of a run by name, each with the mean of every metric that lm-eval gave its questions."""
    names = run.contents.columns.names
    columns = [
        run.column(name) if name in names else [None] * len(run)
        for name in ("task", "doc_id", "repeat", "correct", "metrics")
    ]
    first: dict[str, dict[Any, tuple[Any, Any]]] = {}
    counted: dict[str, int] = {}
    for number, (task, doc_id, repeat, correct, metrics) in enumerate(zip(*columns, strict=True)):
        task = task or ""
        counted[task] = counted.get(task, 0) + 1
        # of each question, what its first sample says
        first.setdefault(task, {}).setdefault(number if doc_id is None else (doc_id, repeat), (correct, metrics))
    of = "questions" if run.made_with.corpus is None else "texts"
    return [_line(task, counted[task], list(docs.values()), of) for task, docs in sorted(first.items())]


def _line(task: str, n_samples: int, docs: list[tuple[Any, Any]], of: str) -> TaskLine:
    known = [bool(correct) for correct, _ in docs if correct is not None]
    by_metric: dict[str, list[float]] = {}
    for _, metrics in docs:
        for filtered, values in _entries(metrics):
            for metric, value in _entries(values):
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                if isinstance(value, int | float):
                    by_metric.setdefault(name, []).append(float(value))
    means = {
        name: (statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)
        for name, values in by_metric.items()
    }
    return TaskLine(task, n_samples, len(docs), sum(known) / len(known) if known else None, means, of)


def _model(name: str, made: RunSettings) -> str:
    """The model's name, its kind and size, and how it ran."""
    shape, config = dict(_entries(made.shape)), dict(_entries(made.config))
    size = f"{shape['n_layers']} layers of {shape['d_model']}" if {"n_layers", "d_model"} <= shape.keys() else None
    known = [each for each in (config.get("model_type"), size, made.dtype, made.quantization, made.attention) if each]
    return f"{name} ({', '.join(map(str, known))})" if known else name


def _state(run: AnyRun) -> str:
    if run.path.is_file():
        return "one file"
    return "finished" if run.finished else "not finished: it was cut short, or still runs (--resume goes on with it)"


def _asked(benchmark: Any) -> str:
    """The tasks, and the options of the benchmark that were given."""
    given = {name: value for name, value in _entries(benchmark) if value not in (None, False, [], {})}
    return ", ".join(each for each in (_pairs(given.pop("names", None)), _pairs(given)) if each)


def _reduced(run: AnyRun) -> str:
    if run.made_with.reduce is None and run.made_with.project is None:
        return ""
    return f"each {'line' if run.contents.is_by_sample else 'row'} is {how_reduced(run.settings)}"


def _stored(run: AnyRun) -> str:
    """The sites, by how their rows are kept."""
    keys: dict[str, list[str]] = {}
    for key, each in run.contents.activations.items():
        keys.setdefault(f"{str(each.dtype).removeprefix('torch.')} {each.width} wide", []).append(key)
    return "; ".join(f"{keys_text(some)}: {how}" for how, some in keys.items())


def _size(run: AnyRun) -> str:
    files = [run.path] if run.path.is_file() else [run.path / name for name in shard_names(run.path)]
    rows = f"{run.contents.n_rows} {'lines' if run.contents.is_by_sample else 'rows'} of {len(run.keys)} sites"
    n_bytes = sum(file.stat().st_size for file in files)
    return f"{len(run)} samples, {rows}; {size_text(n_bytes)} in {len(files)} file{'s' if len(files) > 1 else ''}"


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """The entries of a dict. A file may hold anything in its place, which then has none."""
    return list(value.items()) if isinstance(value, Mapping) else []


def _pairs(value: Any) -> str:
    """A dict, a list or any other value in words; nothing for None."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)

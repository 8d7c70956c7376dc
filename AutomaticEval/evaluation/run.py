"""A benchmark run: load the tasks, draw the questions, evaluate through lm-eval, join each sample to its score.

Scores are lm-eval's. With a selection, every request's activations are in one folder when the run is over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from AutomaticEval.errors import DiskFull, StoreError
from AutomaticEval.evaluation.benchmark import Benchmark, LoadedTasks, forecast, load_tasks, refuse_rolling
from AutomaticEval.evaluation.join import Score, join, scores_of
from AutomaticEval.evaluation.lm import CapturingHFLM
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.selection import Selection
from AutomaticEval.store.files import ensure_space, prepare_folder, size_text
from AutomaticEval.store.writer import RunWriter, shard_bytes_for


@dataclass
class Outcome:
    """What a run gave."""

    scores: list[Score]
    results: dict[str, Any]
    """lm-eval's results, as simple_evaluate returns them, without the samples."""

    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    """lm-eval's logged samples, by task."""

    folder: Path | None = None
    """The run folder, when activations were captured."""

    n_samples: int = 0
    size_bytes: int = 0
    results_file: Path | None = None


def run_benchmark(
    loaded: LoadedModel,
    benchmark: Benchmark,
    selection: Selection | None = None,
    *,
    save_dir: Path = Path("activations"),
    output_path: Path | None = None,
    compression: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Evaluate a model on a benchmark; with a selection, capture it into a run folder in save_dir.

    output_path: folder for lm-eval's own results and samples files; None puts them into the run folder.
    compression: zstd, lz4 or gzip for the activations on the disk; None writes them as they are.
    Raises BenchmarkError, DiskFull before the first forward; CaptureError, StoreError during the run, whose
    sealed shards then stay readable.
    """
    found = load_tasks(benchmark)
    if output_path is not None:
        prepare_folder(output_path)
    if selection is not None:
        return _captured(loaded, benchmark, found, selection, save_dir, output_path, compression, announce)
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=benchmark.batch_size)
    outcome = _evaluate(lm, loaded, benchmark, found)
    if output_path is not None:
        outcome.results_file = _save_results(outcome, loaded, output_path)
    return outcome


def _captured(
    loaded: LoadedModel,
    benchmark: Benchmark,
    found: LoadedTasks,
    selection: Selection,
    save_dir: Path,
    output_path: Path | None,
    compression: str | None,
    announce: Callable[[str], None],
) -> Outcome:
    refuse_rolling(found)
    size = forecast(loaded, benchmark, found, selection)
    announce(f"Activations: at most {size_text(size)} expected in {save_dir}")
    ensure_space(save_dir, size)
    folder = _run_folder(save_dir, benchmark, loaded.name)
    settings = _settings(loaded, benchmark, selection)
    gathered = size * loaded.model.dtype.itemsize if selection.store_dtype == "int8" else size  # narrowed when sealed
    writer = RunWriter(folder, loaded.name, settings, shard_bytes=shard_bytes_for(gathered), compression=compression)
    try:
        with writer:
            lm = CapturingHFLM(loaded, selection, writer.add, doc_ids=found.drawn, batch_size=benchmark.batch_size)
            outcome = _evaluate(lm, loaded, benchmark, found)
            # before the join, so that the scores outlive one that fails
            outcome.results_file = _save_results(outcome, loaded, output_path or folder)
            writer.finish(join(writer.records(), outcome.samples))
    except DiskFull as full:
        full.exit_code = 1  # the run had begun
        raise
    except BaseException:
        announce(f"The run was cut short; {writer.n_samples} samples captured until then are in {folder}")
        raise
    outcome.folder, outcome.n_samples, outcome.size_bytes = folder, writer.n_samples, writer.size_bytes
    return outcome


def _evaluate(lm: HFLM, loaded: LoadedModel, benchmark: Benchmark, found: LoadedTasks) -> Outcome:
    seeds = {}
    if benchmark.seed is not None:
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = dict.fromkeys(names, benchmark.seed)
    results = simple_evaluate(
        model=lm,
        model_args={"pretrained": _short(loaded.name)},
        tasks=list(found.top),
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=benchmark.num_fewshot,
        limit=benchmark.limit,
        samples=found.drawn,
        batch_size=benchmark.batch_size,
        **seeds,
    )
    assert results is not None  # rank 0
    samples = results.pop("samples")
    return Outcome(scores_of(results, samples, found.totals, found.n_questions), results, samples)


def _settings(loaded: LoadedModel, benchmark: Benchmark, selection: Selection) -> dict[str, Any]:
    numbers = loaded.numbers()
    versions = {**numbers["versions"], "lm_eval": lm_eval.__version__}
    return {
        **numbers,
        "shape": loaded.shape,
        "versions": versions,
        **selection.as_dict(),
        "benchmark": asdict(benchmark),
    }


def _run_folder(save_dir: Path, benchmark: Benchmark, model: str) -> Path:
    """A new folder `<benchmark>_<model>_<timestamp>`."""
    prepare_folder(save_dir)
    parts = ("-".join(benchmark.names)[:60], Path(model).name[:60], f"{datetime.now():%Y%m%d_%H%M%S}")
    stem = "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
    number = 1
    while True:
        folder = save_dir / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _short(model: str) -> str:
    """How lm-eval names its folder: a hub name as it is, a folder by its last name."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _save_results(outcome: Outcome, loaded: LoadedModel, folder: Path) -> Path:
    """lm-eval's own `results_*.json` and `samples_*.jsonl`. lm-eval only warns when it cannot write; this raises."""
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf",
        model_args=f"pretrained={_short(loaded.name)}",
        system_instruction=None,
        chat_template=None,
        fewshot_as_multiturn=False,
    )
    samples = json.loads(json.dumps(outcome.samples, default=str))  # saving changes them
    tracker.save_results_aggregated(results=dict(outcome.results), samples=samples)
    for task in samples:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    written = sorted(folder.rglob(f"results_{getattr(tracker, 'date_id', '')}*.json"))
    if not written:
        raise StoreError(f"lm-eval could not write its results into {folder}; the scores were printed nowhere else.")
    return written[-1]

"""A benchmark run: load the tasks, draw the questions, evaluate through lm-eval, join each sample to its score.

Scores are lm-eval's. With a selection, every request's activations are in one folder when the run is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED

from AutomaticEval.errors import AutomaticEvalError, BenchmarkError, DiskFull, OtherSettings, StoreError
from AutomaticEval.evaluation.benchmark import Benchmark, LoadedTasks, load_tasks
from AutomaticEval.evaluation.forecast import forecast
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.evaluation.harness.refusals import refuse_tasks
from AutomaticEval.evaluation.harness.speedups import LoadedBefore, quick_templates, stock_model
from AutomaticEval.evaluation.results.captured_run import Keeping, RunFolder, folder_name, made_with
from AutomaticEval.evaluation.results.join import Score, scores_of, without_verdict
from AutomaticEval.evaluation.results.lm_eval_files import save_results, short_name
from AutomaticEval.evaluation.results.repeats import score_repeats
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.processes import Ranks, join_ranks
from AutomaticEval.selection import Selection
from AutomaticEval.store.disk.whole_files import ensure_space, prepare_folder, size_text
from AutomaticEval.store.run_folder import shards_bytes
from AutomaticEval.store.writer import shard_bytes_for


@dataclass
class Outcome:
    """What a run gave."""

    scores: list[Score]
    results: dict[str, Any] = field(repr=False)
    """lm-eval's results, as simple_evaluate returns them, without the samples."""

    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    """lm-eval's logged samples, by task."""

    folder: Path | None = None
    """The run folder, when activations were captured."""

    n_samples: int = 0
    size_bytes: int = 0
    n_truncated: int = 0
    """Samples whose prompt was cut on the left to fit the context."""

    without_verdict: list[str] = field(default_factory=list)
    """Tasks whose metrics say of no answer whether it is right: their `correct` is none."""

    results_file: Path | None = None
    n_tokens: int = 0
    """Tokens that the requests scored over a prefix tree would have fed one by one, equal ones once."""

    n_computed: int = 0
    """Tokens that were computed for them."""


def run_benchmark(
    loaded: LoadedModel,
    benchmark: Benchmark,
    selection: Selection | None = None,
    *,
    found: LoadedTasks | None = None,
    keeping: Keeping = Keeping(),
    output_path: Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Evaluate a model on a benchmark; with a selection, capture it into a run folder.

    found: the benchmark's tasks, loaded before the model was. output_path: folder for lm-eval's own results and samples
    files; None puts them into the run folder.
    Under `torchrun` or `accelerate launch` the processes share the requests; the first gives the outcome, the others give an
    empty one.
    Raises BenchmarkError, DiskFull before the first forward; OtherSettings for a run that was made otherwise than it is
    resumed; CaptureError, StoreError during the run, whose sealed shards then stay readable.
    """
    ranks = join_ranks()
    found = found or load_tasks(benchmark)
    if benchmark.apply_chat_template and not getattr(loaded.tokenizer, "chat_template", None):
        raise BenchmarkError(
            f"--apply_chat_template: the tokenizer of {loaded.name} has no chat template; leave it out."
        )
    refuse_tasks(loaded.model, selection, found.tasks, stock_model(loaded))
    if output_path is not None:
        prepare_folder(output_path)
    if selection is not None:
        return _captured(loaded, benchmark, found, selection, keeping, output_path, ranks, announce)
    how = _how(benchmark, found, ranks)
    outcome = _evaluate(CapturingHFLM(loaded, None, lambda samples: None, **how), loaded, benchmark, found, ranks)
    if output_path is not None and ranks.is_first:
        outcome.results_file = _saved(outcome, loaded, benchmark, output_path, announce)
    return outcome


def _saved(
    outcome: Outcome, loaded: LoadedModel, benchmark: Benchmark, folder: Path, announce: Callable[[str], None]
) -> Path:
    """lm-eval's results file. When it cannot be written the scores are told all the same."""
    try:
        return save_results(outcome.results, outcome.samples, loaded, benchmark, folder)
    except StoreError as failure:
        failure.exit_code = 1  # the run had begun
        for score in outcome.scores:
            announce(f"{score.task}, {score.metric}: {score.value:.4f}")
        raise


def _captured(
    loaded: LoadedModel,
    benchmark: Benchmark,
    found: LoadedTasks,
    selection: Selection,
    keeping: Keeping,
    output_path: Path | None,
    ranks: Ranks,
    announce: Callable[[str], None],
) -> Outcome:
    size = forecast(loaded, benchmark, found, selection, ranks.n_ranks)
    there = 0 if keeping.resume is None else shards_bytes(keeping.resume)
    if ranks.is_first:
        already = f", {size_text(there)} of it already there" if there else ""
        announce(f"Activations: {size} expected{already}")
    ensure_space(keeping.resume or keeping.save_dir, size.room_bytes - there)
    folder = RunFolder(
        keeping,
        folder_name(benchmark.names, loaded.name),
        loaded.name,
        made_with(loaded, selection).changed(benchmark=benchmark.as_dict()),
        shard_bytes_for(size.rows_bytes),
        ranks,
        loaded.paths,
    )
    try:
        with folder.writing() as (writer, answered):
            if ranks.is_first:
                announce(f"Run folder: {writer.folder}{_went_before(keeping, len(answered))}")
            how = {**_how(benchmark, found, ranks), "answered": answered}
            outcome = _evaluate(CapturingHFLM(loaded, selection, writer.add, **how), loaded, benchmark, found, ranks)
            if ranks.is_first:  # before the join, so that the scores outlive one that fails
                outcome.results_file = _saved(outcome, loaded, benchmark, output_path or writer.folder, announce)
        repeats = score_repeats(found.tasks, found.drawn) if ranks.is_first else None
        folder.finish(outcome.samples, repeats=repeats, directions=outcome.results.get("higher_is_better"))
    except DiskFull as full:
        full.exit_code = 1  # the run had begun
        raise
    except BaseException as failure:
        if folder.path is not None and folder.path.exists():
            there_now = f"{folder.n_samples} samples captured until then are in {folder.path}"
            announce(f"\nThe run was cut short; {there_now}. {_what_next(failure)}")
        raise
    outcome.folder, outcome.n_samples, outcome.size_bytes = folder.path, folder.n_samples, folder.size_bytes
    outcome.n_truncated = folder.n_truncated
    return outcome


def _what_next(failure: BaseException) -> str:
    """Whether a resume can go on after a failure: not where it would meet the same refusal again."""
    if isinstance(failure, OtherSettings) or (
        isinstance(failure, AutomaticEvalError) and not isinstance(failure, StoreError)
    ):
        return "Resumed as it is, it would end in the same way."
    is_stopped = isinstance(failure, KeyboardInterrupt | SystemExit)
    return (
        f"{'The' if is_stopped else 'Once its cause is gone, the'} same command with --resume and that folder goes on."
    )


def _how(benchmark: Benchmark, found: LoadedTasks, ranks: Ranks) -> dict[str, Any]:
    """How lm-eval's model serves a benchmark."""
    return {
        "scoring": benchmark.scoring,
        "doc_ids": found.drawn,
        "ranks": ranks,
        "batch_size": benchmark.batch_size,
    }


def _went_before(keeping: Keeping, n_answered: int) -> str:
    if keeping.resume is None:
        return ""
    return (
        f" ({n_answered} requests are answered there)"
        if n_answered
        else " (nothing was sealed there: from the beginning)"
    )


def _evaluate(
    lm: CapturingHFLM, loaded: LoadedModel, benchmark: Benchmark, found: LoadedTasks, ranks: Ranks
) -> Outcome:
    seeds = {}
    if benchmark.seed is not None:
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = dict.fromkeys(names, benchmark.seed)
    if not ranks.is_first:  # or all would sample alike
        seeds["torch_random_seed"] = seeds.get("torch_random_seed", DEFAULT_OTHER_SEED) + ranks.rank
    with quick_templates():
        results = simple_evaluate(
            model=lm,
            model_args={"pretrained": short_name(loaded.name)},
            tasks=list(found.top),
            task_manager=LoadedBefore(found.drawn_with, is_first=ranks.is_first),
            num_fewshot=benchmark.num_fewshot,
            limit=benchmark.limit,
            samples=found.drawn,
            batch_size=benchmark.batch_size,
            apply_chat_template=benchmark.apply_chat_template,
            system_instruction=benchmark.system_instruction,
            gen_kwargs=benchmark.gen_kwargs,
            predict_only=benchmark.predict_only,
            confirm_run_unsafe_code=benchmark.confirm_run_unsafe_code,
            **seeds,
        )
    n_tokens, n_computed = map(sum, zip(*ranks.gathered(lm.n_tokens), strict=True))
    if results is None or not ranks.is_first:
        return Outcome([], {}, {})
    samples = results.pop("samples")
    scores = scores_of(results, samples, found.totals, found.n_questions)
    unjudged = without_verdict(results, samples)
    return Outcome(scores, results, samples, without_verdict=unjudged, n_tokens=n_tokens, n_computed=n_computed)

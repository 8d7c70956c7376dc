"""A benchmark run: load the tasks, draw the questions, evaluate through lm-eval, join each sample to its score.

Scores are lm-eval's. With a selection, every request's activations are in one folder when the run is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED

from AutomaticEval.capture.draws import derived_seed
from AutomaticEval.capture.graph.way import refuse_graphless, way_of
from AutomaticEval.errors import AutomaticEvalError, BenchmarkError, DiskFull, OtherSettings, StoreError, warn
from AutomaticEval.evaluation.benchmark import BUNDLED_NAMES, LoadedTasks, asked_docs, load_tasks
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.forecast import forecast
from AutomaticEval.evaluation.harness.batch_capture import Sink
from AutomaticEval.evaluation.harness.call import Workload
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.evaluation.harness.refusals import refuse_tasks, refuse_thinking
from AutomaticEval.evaluation.harness.speedups import LoadedBefore, environment_once, quick_templates, stock_model
from AutomaticEval.evaluation.results.captured_run import RunFolder, folder_name, made_with
from AutomaticEval.evaluation.results.earlier_answers import EarlierAnswer
from AutomaticEval.evaluation.results.join import Score, scores_of, without_verdict
from AutomaticEval.evaluation.results.lm_eval_files import save_results, short_name
from AutomaticEval.evaluation.results.repeats import score_repeats
from AutomaticEval.evaluation.results.request_key import RequestKey
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.evaluation.screen import whole_run
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.processes import Ranks, command_line, join_ranks
from AutomaticEval.public_names import BUNDLED_MODELS
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
    """Tasks whose metrics do not say whether an answer is right. The `correct` of their samples is none."""

    results_file: Path | None = None
    """lm-eval's results file, when there is one; the answers are beside it, in samples_<task>_<time>.jsonl."""

    n_tokens: int = 0
    """Tokens that the requests scored over a prefix tree would have fed one by one, equal requests counted once. Requests of this call alone: a
    run that goes on does not count what was on the disk."""

    n_computed: int = 0
    """Tokens that were computed for these requests."""

    n_before: int = 0
    """Samples that were on the disk already, of a run that went on."""


def run_benchmark(
    loaded: LoadedModel,
    benchmark: Benchmark,
    selection: Selection | None = None,
    *,
    loaded_tasks: LoadedTasks | None = None,
    output: RunOutput = RunOutput(),
    output_path: Path | None = None,
    announce: Callable[[str], None] | None = None,
) -> Outcome:
    """Evaluate a model on a benchmark; with a selection, capture it into a run folder.

    loaded_tasks: the benchmark's tasks, when they were loaded before the model. output_path: folder for lm-eval's own results and samples
    files; None puts them into the run folder. announce: is called with each line that a person should read during the run; None
    adds what became of a run that was cut short to the error that cut it.
    Under `torchrun` or `accelerate launch` the processes share the requests; the first returns the outcome, the others return an empty one.
    Raises BenchmarkError, DeviceUnavailable, DiskFull before the first forward; OtherSettings for a run that is resumed with other settings than it was made
    with; CaptureError, StoreError during the run, whose sealed shards then stay readable.
    """
    ranks = join_ranks()
    loaded_tasks = loaded_tasks or load_tasks(benchmark)
    if benchmark.apply_chat_template and not getattr(loaded.tokenizer, "chat_template", None):
        raise BenchmarkError(
            f"--apply_chat_template: the tokenizer of {loaded.name} has no chat template; leave it out."
        )
    refuse_thinking(benchmark.of_thinking, loaded.tokenizer, loaded_tasks.tasks)
    _warn_of_demo(loaded, benchmark)
    refuse_graphless(loaded.model, benchmark.generation)
    refuse_tasks(loaded.model, selection, loaded_tasks.tasks, stock_model(loaded, benchmark.of_thinking))
    if output_path is not None and not (selection is not None and output.holds(output_path)):
        prepare_folder(output_path)
    run = _Run(loaded, benchmark, loaded_tasks, ranks, announce)
    if selection is not None:
        return run.captured(selection, output, output_path)
    outcome = run.evaluated()
    if output_path is not None and ranks.is_first:
        outcome.results_file = run.saved(outcome, output_path)
    return outcome


@dataclass(frozen=True)
class _Run:
    """A model, a benchmark and its tasks, about to be evaluated."""

    loaded: LoadedModel
    benchmark: Benchmark
    tasks: LoadedTasks
    ranks: Ranks
    tell: Callable[[str], None] | None

    def announce(self, line: str) -> None:
        """Tell a person a line, when there is one who reads."""
        if self.tell is not None:
            self.tell(line)

    def captured(self, selection: Selection, output: RunOutput, output_path: Path | None) -> Outcome:
        """Evaluate, and capture a selection into a run folder."""
        folder = self._folder(selection, output)
        try:
            with folder.writing() as (writer, answered):
                if self.ranks.is_first:
                    self.announce(f"Run folder: {writer.folder}{_went_before(output, len(answered))}")
                outcome = self.evaluated(selection, writer.add, answered)
                if self.ranks.is_first:  # before the join, so that the scores outlive one that fails
                    outcome.results_file = self.saved(outcome, output_path or writer.folder)
            repeats = score_repeats(self.tasks.tasks, self.tasks.drawn) if self.ranks.is_first else None
            folder.finish(outcome.samples, repeats=repeats, directions=outcome.results.get("higher_is_better"))
        except BaseException as failure:
            if isinstance(failure, DiskFull):
                failure.interrupts_run()
            if folder.path is not None and folder.path.exists():
                self._tell_cut(failure, folder.path, folder.n_samples, asked=bool(output.asked))
            raise
        outcome.folder, outcome.n_samples, outcome.size_bytes = folder.path, folder.n_samples, folder.size_bytes
        outcome.n_truncated, outcome.n_before = folder.n_truncated, len(answered)
        return outcome

    def _tell_cut(self, failure: BaseException, folder: Path, n_samples: int, *, asked: bool) -> None:
        """Say where the samples of a run are that was cut short, and how it goes on. asked: its folder says what it was asked for."""
        there_now = f"The run was cut short; {n_samples} samples captured until then are in {folder}."
        if self.tell is None:
            resume = f"resume={str(folder)!r}"
            again = f"evaluate_with_activations({resume})" if asked else f"the same call, with {resume}"
            failure.add_note(f"{there_now} {_what_next(failure, again)}")
        else:
            launched = " (with the launcher of this run)" if self.ranks.n_ranks > 1 else ""
            self.announce(f"\n{there_now} {_what_next(failure, command_line('--resume', str(folder)) + launched)}")

    def _folder(self, selection: Selection, output: RunOutput) -> RunFolder:
        """Where the run goes, when there is room for it. Raises DiskFull."""
        size = forecast(self.loaded, self.benchmark, self.tasks, selection, self.ranks.n_ranks)
        there = 0 if output.resume is None else shards_bytes(output.resume)
        if self.ranks.is_first:
            already = f", {size_text(there)} of it already there" if there else ""
            self.announce(f"Activations: {size} expected{already}")
        ensure_space(output.place, size.room_bytes - there)
        return RunFolder(
            output,
            folder_name(self.benchmark.names, self.loaded.name),
            self.loaded.name,
            made_with(self.loaded, selection).changed(benchmark=self.benchmark.as_dict(), **self._way_of_generating()),
            shard_bytes_for(size.rows_bytes),
            self.ranks,
            self.loaded.paths,
            {**selection.matrices, **self.loaded.edit_values()},
        )

    def _way_of_generating(self) -> dict[str, str]:
        """What the settings say of how answers are generated; nothing when none is."""
        generates = any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.tasks.values())
        if not generates or self.benchmark.scoring == "stock":
            return {}
        return way_of(self.loaded.model, self.benchmark.generation, {}).settings

    def evaluated(
        self,
        selection: Selection | None = None,
        sink: Sink = lambda samples: None,
        answered: Mapping[RequestKey, EarlierAnswer] = {},
    ) -> Outcome:
        """What lm-eval says of the model. selection, sink: what is captured, and where it goes. answered: what is not computed again."""
        workload = Workload(self.tasks.drawn or {}, answered, self.ranks)
        how: dict[str, Any] = {name: getattr(self.benchmark, name) for name in ("scoring", "generation", "batch_size")}
        lm = CapturingHFLM(self.loaded, selection, sink, workload=workload, **how, **self.benchmark.of_thinking)
        results = self._simple_evaluate(lm)
        n_tokens, n_computed = map(sum, zip(*self.ranks.gathered(lm.n_tokens), strict=True))
        if results is None or not self.ranks.is_first:
            return Outcome([], {}, {})
        samples = results.pop("samples")
        scores = scores_of(results, samples, self.tasks.totals, self.tasks.n_questions)
        unjudged = without_verdict(results, samples)
        return Outcome(scores, results, samples, without_verdict=unjudged, n_tokens=n_tokens, n_computed=n_computed)

    def _simple_evaluate(self, lm: CapturingHFLM) -> dict[str, Any] | None:
        """lm-eval's results with its logged samples; None in all processes but the first."""
        benchmark, is_first = self.benchmark, self.ranks.is_first
        seeds = {}
        if benchmark.seed is not None:
            names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
            seeds = dict.fromkeys(names, benchmark.seed)
        if not is_first and benchmark.scoring == "stock":  # or all would sample the same answers
            own_seed = derived_seed(seeds.get("torch_random_seed", DEFAULT_OTHER_SEED), "process", self.ranks.rank)
            seeds["torch_random_seed"] = own_seed
        totals = self.tasks.totals
        asked = (asked_docs(totals[name], benchmark, self.tasks.drawn, name) for name in self.tasks.tasks)
        with quick_templates(), environment_once(), whole_run(sum(map(len, asked)), shows=is_first):
            results: dict[str, Any] | None = simple_evaluate(
                model=lm,
                model_args={"pretrained": short_name(self.loaded.name), **benchmark.of_thinking},
                tasks=list(self.tasks.top),
                task_manager=LoadedBefore(self.tasks.random_states, is_first=is_first),
                num_fewshot=benchmark.num_fewshot,
                limit=benchmark.limit,
                samples=self.tasks.drawn,
                batch_size=benchmark.batch_size,
                apply_chat_template=benchmark.apply_chat_template,
                system_instruction=benchmark.system_instruction,
                gen_kwargs=benchmark.gen_kwargs,
                predict_only=benchmark.predict_only,
                confirm_run_unsafe_code=benchmark.confirm_run_unsafe_code,
                **seeds,
            )
        return results

    def saved(self, outcome: Outcome, folder: Path) -> Path:
        """lm-eval's results file. When it cannot be written the scores are announced all the same."""
        try:
            return save_results(outcome.results, outcome.samples, self.loaded, self.benchmark, folder)
        except StoreError as failure:
            failure.interrupts_run()
            for score in outcome.scores:
                self.announce(f"{score.task}, {score.metric}: {score.value:.4f}")
            raise


def _warn_of_demo(loaded: LoadedModel, benchmark: Benchmark) -> None:
    """Warn of scores that say nothing: those of the bundled model on tasks that are not of its world."""
    others = [name for name in benchmark.names if name not in BUNDLED_NAMES]
    if loaded.name in BUNDLED_MODELS and others and not benchmark.include_path:
        warn(
            f"the model {loaded.name} knows only its own small world, and guesses on {', '.join(others)}; name another model (--model gpt2)."
        )


def _what_next(failure: BaseException, again: str) -> str:
    """How a run goes on after a failure: not where it would meet the same refusal again. again: the command or call that resumes it."""
    if isinstance(failure, OtherSettings) or (
        isinstance(failure, AutomaticEvalError) and not isinstance(failure, StoreError)
    ):
        return "Resumed as it is, it would end in the same way."
    is_stopped = isinstance(failure, KeyboardInterrupt | SystemExit)
    return f"{'To go on' if is_stopped else 'Once the cause is gone, to go on'}:\n  {again}"


def _went_before(output: RunOutput, n_answered: int) -> str:
    if output.resume is None:
        return ""
    return (
        f" ({n_answered} requests are answered there)"
        if n_answered
        else " (nothing was sealed there: from the beginning)"
    )

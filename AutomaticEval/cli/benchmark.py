"""`main.py --capture_activations --benchmark mmlu`: run a benchmark, print the scores, say where things went."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors, with_load
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import BenchmarkError, SelectionError

if TYPE_CHECKING:
    from AutomaticEval.evaluation.results.join import Score
    from AutomaticEval.evaluation.run import Outcome


@one_line_errors
@with_load
def benchmark(
    load: options.Load,
    context: typer.Context,
    capture_activations: options.CaptureActivations = False,
    head_strength: options.HeadStrength = False,
    benchmark: options.Benchmarks = "demo",
    model: options.Model = "demo",
    num_trials: options.NumTrials = None,
    num_fewshot: options.NumFewshot = None,
    limit: options.Limit = None,
    layers: options.Layers = None,
    sites: options.Sites = None,
    positions: options.Positions = None,
    store_dtype: options.StoreDtype = None,
    compression: options.Compression = None,
    strict: options.Strict = False,
    activation_save_dir: options.SaveDir = Path("activations"),
    resume: options.Resume = None,
    output_path: options.OutputPath = None,
    include_path: options.IncludePath = None,
    benchmark_data: options.BenchmarkData = None,
    apply_chat_template: options.ApplyChatTemplate = False,
    system_instruction: options.SystemInstruction = None,
    gen_kwargs: options.GenKwargs = None,
    repeats: options.Repeats = None,
    predict_only: options.PredictOnly = False,
    confirm_run_unsafe_code: options.UnsafeCode = False,
    batch_size: options.BatchSize = "8",
    scoring: options.Scoring = "tree",
    seed: options.Seed = None,
    mlflow: options.Mlflow = None,
    use_cache: options.UseCache = None,
    cache_requests: options.CacheRequests = None,
) -> None:
    """Run language models on benchmarks and prompts, and keep their activations from the pass that answered.

    Without a command: run a benchmark through lm-evaluation-harness.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return
    captures = capture_activations or head_strength
    how = "--capture_activations"
    if head_strength:
        sites, positions = _with_norms(sites, positions, alone=not capture_activations)
    selection = options.chosen(sites, layers, positions, store_dtype, "scored", captures=captures, how=how)
    for name, given in (("--compression", compression), ("--resume", resume), ("--strict", strict or None)):
        if given is not None and not captures:
            raise SelectionError(f"{name} was given, but nothing is captured; add --capture_activations.")
    if not captures:
        options.refuse_unused(context, "nothing is captured", "activation_save_dir")
    options.quiet_libraries()
    from AutomaticEval.evaluation.benchmark import WHY_NOT, Benchmark, load_tasks
    from AutomaticEval.evaluation.results.captured_run import Keeping
    from AutomaticEval.evaluation.run import run_benchmark
    from AutomaticEval.models.loading import load_model, n_layers_of
    from AutomaticEval.processes import join_ranks
    from AutomaticEval.report.mlflow_run import require_mlflow
    from AutomaticEval.store.hdf5.write import check_compression

    for name, given in (("use_cache", use_cache), ("cache_requests", cache_requests)):
        if given is not None:
            raise BenchmarkError(f"--{name}: {WHY_NOT[name]}")
    ranks = join_ranks()
    say = options.Log(speaks=ranks.is_first)
    if mlflow is not None:
        require_mlflow()
    say("Loading …")
    check_compression(compression)
    keeping = Keeping(activation_save_dir, resume, compression, strict)
    asked = Benchmark(
        names=tuple(name.strip() for name in benchmark.split(",") if name.strip()),
        num_trials=num_trials,
        limit=limit,
        num_fewshot=num_fewshot,
        seed=seed,
        batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
        scoring=scoring,
        include_path=tuple(map(str, include_path or ())),
        local_files=None if benchmark_data is None else str(benchmark_data),
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        gen_kwargs=gen_kwargs,
        repeats=repeats,
        predict_only=predict_only,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    if selection is not None:
        selection.sites(n_layers_of(model, load()))  # a wrong layer is refused before the weights load
    options.tell_of_code(benchmark, include_path, say)
    found = load_tasks(asked)  # what is wrong with a task is told before a large model loads
    loaded = load_model(model, options=load())
    started = time.perf_counter()
    outcome = run_benchmark(
        loaded, asked, selection, found=found, keeping=keeping, output_path=output_path, announce=say
    )
    if ranks.is_first:
        _print(outcome, f"{benchmark} on {model}")
        if head_strength and outcome.folder is not None:
            _write_strength(outcome.folder)
        if mlflow is not None:
            about = {"model": loaded.name, "benchmark": asked.as_dict(), "load": load().as_dict()}
            about |= {} if selection is None else {"selection": selection.as_dict()}
            _track(outcome, f"{benchmark} on {loaded.name}", about, mlflow, say, time.perf_counter() - started)


def _refuse_options_before(context: typer.Context) -> None:
    """Raises SelectionError for options that stand before a command, which would not be heeded."""
    sources = {each: context.get_parameter_source(each.name or "") for each in context.command.params}
    given = [each.opts[0] for each, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        command = context.invoked_subcommand
        raise SelectionError(
            f"{', '.join(given)} before the command {command!r} would be ignored; write what it takes of them after it: "
            f"{command} … {given[0]} …"
        )


def _with_norms(sites: str | None, positions: str | None, *, alone: bool) -> tuple[str, str | None]:
    """What --head_strength keeps: the norms of the heads' results, at every position when nothing else is captured."""
    if not alone:
        from AutomaticEval.sites import DEFAULT_KINDS

        return f"{sites or ','.join(DEFAULT_KINDS)},head_result_norm", positions
    if sites is not None:
        raise SelectionError("--sites was given with --head_strength alone; add --capture_activations to keep more.")
    return "head_result_norm", positions or "all"


def _write_strength(folder: Path) -> None:
    from AutomaticEval.analysis.heads.strength import strength_of_run, strength_result
    from AutomaticEval.settings import MODEL
    from AutomaticEval.store.disk.json_files import write_json
    from AutomaticEval.store.reader import open_run

    file = folder / "head_strength.json"
    run = open_run(folder)
    about = {name: run.settings.get(name) for name in ("positions", "scoring", MODEL)}
    write_json(file, strength_result(strength_of_run(run), run.model, "result", **about).as_json(), overwrite=True)
    say(f"Heads:       {file}")


def _track(outcome: Outcome, name: str, about: dict[str, Any], uri: str, log: options.Log, seconds: float) -> None:
    """Log a run to MLflow: its settings, scores, sizes, lm-eval's results and what was said."""
    from AutomaticEval.report.mlflow_run import track

    metrics: dict[str, float | None] = {f"{each.task}/{each.metric}": each.value for each in outcome.scores}
    metrics |= {"seconds": seconds, "n_samples": outcome.n_samples, "size_bytes": outcome.size_bytes}
    if outcome.n_computed:
        metrics["tokens_per_second"] = outcome.n_computed / seconds
    files = [] if outcome.results_file is None else [outcome.results_file]
    say(f"MLflow:      run {track(uri, name, about, metrics, files, log.text)}")


def _print(outcome: Outcome, title: str) -> None:
    columns = ("Task", "Metric", "Score", "Chance", "Questions")
    print_table(title, columns, map(_row, outcome.scores), n_words=2)
    if outcome.n_computed:
        times = outcome.n_tokens / outcome.n_computed
        say(
            f"Scoring: {outcome.n_computed} tokens computed over the requests' prefix tree; one by one they have {outcome.n_tokens} "
            f"({times:.1f} times as many)"
        )
    if outcome.without_verdict:
        say(f"No verdict:  {', '.join(outcome.without_verdict)} (column correct is none)")
    if outcome.n_truncated:
        say(
            f"Cut prompts: {outcome.n_truncated} of {outcome.n_samples} samples lost their beginning (column n_truncated)"
        )
    if outcome.folder is not None:
        from AutomaticEval.store.disk.whole_files import size_text

        say(f"Activations: {outcome.folder} ({outcome.n_samples} samples, {size_text(outcome.size_bytes)})")
        say(f"Load them:   from AutomaticEval import open_run; run = open_run({str(outcome.folder)!r})")
    if outcome.results_file is not None:
        say(f"Results:     {outcome.results_file}")


def _row(score: Score) -> tuple[str, ...]:
    value = f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
    chance = "" if score.chance is None else f"{score.chance:.4f}"
    return score.task, score.metric, value, chance, f"{score.answered} of {score.total}"

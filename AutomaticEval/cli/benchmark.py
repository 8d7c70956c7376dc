"""`main.py --capture_activations --benchmark mmlu`: run a benchmark, print the scores, say where things went."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval import __version__
from AutomaticEval.cli import options
from AutomaticEval.cli.options import KEEP, OUTPUT, RUN, command, is_given, options_of, refuse_unused, takes
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import BenchmarkError, OtherSettings, SelectionError, StoreError
from AutomaticEval.evaluation.asked import asked_for, asked_of
from AutomaticEval.evaluation.benchmark_options import WHY_NOT, Benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.options import options_in
from AutomaticEval.selection import Positions, Selection

if TYPE_CHECKING:
    from AutomaticEval.evaluation.results.join import Score
    from AutomaticEval.evaluation.run import Outcome

OF_THIS_CALL = ("context", "resume", "output", "overwrite", "activation_save_dir", "version")
"""What a run is not asked for: where it goes, what is there, and whether it goes on."""
OF_CAPTURE = (*options_in(Selection), *options_in(RunOutput))
"""Options that are refused when nothing is captured, but for --output, which then names the folder for lm-eval's results."""


RESULTS = Path("results")
"""The folder for lm-eval's results when nothing is captured and no folder is named."""

CaptureActivations = Annotated[
    bool,
    typer.Option("--capture_activations", help="Keep the activations of every question.", rich_help_panel=KEEP),
]
HeadStrength = Annotated[
    bool,
    typer.Option(
        "--head_strength",
        help="Measure how strong each head is: head_strength.json in the run folder.",
        rich_help_panel=KEEP,
    ),
]
DropExperts = Annotated[
    str | None,
    typer.Option(
        "--drop_experts",
        help="Experts that routers may not choose, layer:expert, such as 3:0,5:2-4.",
        metavar="EXPERTS",
        rich_help_panel=RUN,
    ),
]
OutputPath = Annotated[
    Path | None,
    typer.Option(
        "--output_path",
        help="Folder for lm-eval's own results and samples files. Default: the run's folder, or results when nothing is captured.",
        rich_help_panel=OUTPUT,
    ),
]
UseCache = Annotated[str | None, typer.Option("--use_cache", hidden=True)]
CacheRequests = Annotated[str | None, typer.Option("--cache_requests", hidden=True)]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]


def _taken_up(context: typer.Context, **given: Any) -> dict[str, Any]:
    """What was given, with what the run that --resume names was asked for beside it. Raises StoreError, and SelectionError for options that would be ignored."""
    alone = not (given["capture_activations"] or given["head_strength"])
    if context.invoked_subcommand is None and given["resume"] is not None:
        given = _with_the_runs(context, given, needed=alone)
    _refuse_ignored(context, **given)
    return given


def _with_the_runs(context: typer.Context, given: dict[str, Any], *, needed: bool) -> dict[str, Any]:
    """What was given; what was not, as the run was asked. needed: the run must say it."""
    try:
        asked = asked_of(given["resume"])
    except StoreError:
        if needed:
            raise
        return given
    unknown = sorted(asked.keys() - given.keys())
    if unknown:
        raise OtherSettings(
            f"{given['resume']} was asked for with {', '.join(unknown)}, which the command does not have; go on with it in code: "
            "evaluate_with_activations(resume=…)."
        )
    typed = context.get_parameter_source("resume")
    assert typed is not None
    for name, value in asked.items():
        if not is_given(context, name):
            given[name] = context.params[name] = Path(value) if name == "output_path" else value
            context.set_parameter_source(name, typed)
    return given


def _refuse_ignored(context: typer.Context, capture_activations: bool, head_strength: bool, **others: object) -> None:
    """Raises SelectionError for options that would be ignored."""
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
    elif not (capture_activations or head_strength):
        unused = (name for name in OF_CAPTURE if name != "output")
        refuse_unused(context, "nothing is captured", *unused, remedy="add --capture_activations")
        if is_given(context, "output"):
            refuse_unused(context, "--output names the folder for lm-eval's results, too", "output_path")
    elif is_given(context, "output"):
        refuse_unused(context, "--output names the run's own folder", "activation_save_dir")


def _refuse_options_before(context: typer.Context) -> None:
    """Raises SelectionError for options that stand before a command, because they would be ignored."""
    sources = {each: context.get_parameter_source(each.name or "") for each in context.command.params}
    given = [each.opts[0] for each, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        command = context.invoked_subcommand
        raise SelectionError(
            f"{', '.join(given)} before the command {command!r} would be ignored; write what it takes of them after it: "
            f"{command} … {given[0]} …"
        )


@command
@takes(
    _taken_up,
    asked=options_of(Benchmark, benchmark="demo"),
    selection=options_of(Selection, positions="scored"),
    load=LoadOptions,
    output=RunOutput,
)
def benchmark(
    context: typer.Context,
    asked: Benchmark,
    selection: Selection,
    load: LoadOptions,
    output: RunOutput,
    capture_activations: CaptureActivations = False,
    head_strength: HeadStrength = False,
    model: options.Model = "demo",
    drop_experts: DropExperts = None,
    output_path: OutputPath = None,
    mlflow: options.Mlflow = None,
    use_cache: UseCache = None,
    cache_requests: CacheRequests = None,
    version: Version = False,
) -> None:
    """Run language models on benchmarks and prompts, and keep their activations from the pass that answered.

    Without a command: run a benchmark through lm-evaluation-harness.
    """
    if context.invoked_subcommand is not None:
        return
    if version:
        say(f"AutomaticEval {__version__}")
        return
    _refuse_caches(use_cache=use_cache, cache_requests=cache_requests)
    kept = _kept(context, selection, capture_activations=capture_activations, head_strength=head_strength)
    options.quiet_libraries()
    from AutomaticEval.evaluation.benchmark import load_tasks
    from AutomaticEval.evaluation.run import run_benchmark
    from AutomaticEval.models.editing import editing
    from AutomaticEval.models.experts.dropped import dropped_experts
    from AutomaticEval.models.loading import load_model, n_layers_of
    from AutomaticEval.processes import join_ranks
    from AutomaticEval.report.mlflow_run import require_mlflow

    edits = [] if drop_experts is None else dropped_experts(drop_experts)
    ranks = join_ranks()
    log = options.Log(speaks=ranks.is_first)
    log("Loading …")
    if mlflow is not None:
        require_mlflow()
    output.refuse_before_loading(makes_folder=ranks.is_first and kept is not None)
    if kept is not None:
        kept.sites(n_layers_of(model, load))  # a wrong layer is refused before the weights load
    options.tell_of_code(asked, log)
    tasks = load_tasks(asked)  # what is wrong with a task is told before a large model loads
    loaded = load_model(model, options=load)
    started = time.perf_counter()
    output = replace(output, asked=_asked(context))
    results = output_path if kept is not None else output_path or output.output or RESULTS
    with editing(loaded, edits) if edits else nullcontext():
        outcome = run_benchmark(
            loaded, asked, kept, loaded_tasks=tasks, output=output, output_path=results, announce=log
        )
    if not ranks.is_first:
        return
    names = ",".join(asked.names)
    weights = [
        f", {name} {value}" for name, value in loaded.loaded_with.items() if name in ("peft", "adapter", "delta")
    ]
    changed = "".join(weights) + ("" if drop_experts is None else f", without experts {drop_experts}")
    _print(outcome, f"{names} on {model}{changed}", scores=not asked.predict_only)
    if kept is not None and outcome.folder is not None:
        _tell_of_thinking(outcome.folder, kept)
    if head_strength and outcome.folder is not None:
        _write_strength(outcome.folder)
    if mlflow is not None:
        kept_as = {} if kept is None else {"selection": kept.as_dict()}
        about = {"model": loaded.name, "benchmark": asked.as_dict(), "load": load.as_dict(), **kept_as}
        _track(outcome, f"{names} on {loaded.name}", about, mlflow, log, time.perf_counter() - started)


def _asked(context: typer.Context) -> dict[str, Any]:
    """The options that were given, but for those of this call alone: with them, --resume goes on."""
    given = {name: value for name, value in context.params.items() if is_given(context, name)}
    return asked_for({name: value for name, value in given.items() if name not in OF_THIS_CALL})


def _refuse_caches(**given: str | None) -> None:
    """Raises BenchmarkError for caches of lm-eval, which would break the link between a request and its forward."""
    for name, value in given.items():
        if value is not None:
            raise BenchmarkError(f"--{name}: {WHY_NOT[name]}")


def _kept(
    context: typer.Context, selection: Selection, *, capture_activations: bool, head_strength: bool
) -> Selection | None:
    """What is kept of every question; None when nothing is captured."""
    if head_strength:
        return _with_norms(selection, context, alone=not capture_activations)
    return selection if capture_activations else None


def _with_norms(selection: Selection, context: typer.Context, *, alone: bool) -> Selection:
    """What --head_strength keeps: the norms of the heads' results, at every position when nothing else is captured."""
    if selection.reduction is not None:
        raise SelectionError(
            f"--head_strength reads whole rows, and {selection.reduction.name} was asked for; run it without --reduce and --project."
        )
    if not alone:
        return replace(selection, kinds=tuple(dict.fromkeys([*selection.kinds, "head_result_norm"])))
    if is_given(context, "sites"):
        raise SelectionError("--sites was given with --head_strength alone; add --capture_activations to keep more.")
    positions = selection.positions if is_given(context, "positions") else Positions()
    return replace(selection, kinds=("head_result_norm",), positions=positions)


def _tell_of_thinking(folder: Path, kept: Selection) -> None:
    """Say in how many answers there is thinking, where positions of it were asked for: a run that kept nothing looks like any other."""
    if kept.positions.part not in ("thinking", "answer"):
        return
    from AutomaticEval.store.reader import open_run

    run = open_run(folder)
    found = run.column("thinking") if "thinking" in run.contents.columns.names else []
    n_thought = sum(each is not None for each in found)
    say(f"Thinking:    in {n_thought} of {len(run)} samples{'' if n_thought else '. ' + options.NO_THINKING}")


def _write_strength(folder: Path) -> None:
    from AutomaticEval.analysis.heads.strength import inputs_of_run, strength_of_run, strength_result
    from AutomaticEval.settings import MODEL
    from AutomaticEval.store.disk.json_files import write_json
    from AutomaticEval.store.reader import open_run

    file = folder / "head_strength.json"
    run = open_run(folder)
    about: dict[str, Any] = {
        "positions": run.settings.get("positions"),
        "scoring": (run.settings.get("benchmark") or {}).get("scoring"),
        MODEL: run.settings.get(MODEL),
        "inputs": inputs_of_run(run),
    }
    result = strength_result(strength_of_run(run), run.model, "result", **about)
    write_json(file, replace(result, settings=run.settings).as_json(), overwrite=True)
    say(f"Heads:       {file}")


def _track(outcome: Outcome, name: str, about: dict[str, Any], uri: str, log: options.Log, seconds: float) -> None:
    """Log a run to MLflow: its settings, scores and sizes, lm-eval's results, and the lines that were printed."""
    from AutomaticEval.report.mlflow_run import track

    metrics: dict[str, float | None] = {f"{each.task}/{each.metric}": each.value for each in outcome.scores}
    metrics |= {"seconds": seconds, "n_samples": outcome.n_samples, "size_bytes": outcome.size_bytes}
    if outcome.n_computed:
        metrics["tokens_per_second"] = outcome.n_computed / seconds
    files = [] if outcome.results_file is None else [outcome.results_file]
    say(f"MLflow:      run {track(uri, name, about, metrics, files, log.text)}")


def _print(outcome: Outcome, title: str, *, scores: bool) -> None:
    if scores:
        columns = ("Task", "Metric", "Score", "Chance", "Questions")
        print_table(title, columns, map(_row, outcome.scores), n_words=2)
    else:
        _print_answers(outcome, title)
    if outcome.n_computed:
        times = outcome.n_tokens / outcome.n_computed
        part = f" in this part ({outcome.n_before} samples were there already)" if outcome.n_before else ""
        say(
            f"Scoring{part}: {outcome.n_computed} tokens computed over the requests' prefix tree; one by one they have {outcome.n_tokens} "
            f"({times:.1f} times as many)"
        )
    if scores and outcome.without_verdict:
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


def _print_answers(outcome: Outcome, title: str) -> None:
    """Where the answers of a run without scores are."""
    n_questions = sum(len({entry["doc_id"] for entry in logged}) for logged in outcome.samples.values())
    say(f"{title}: {n_questions} questions answered, and none scored (--predict_only)")
    if outcome.results_file is not None:
        say(
            f"Answers:     {outcome.results_file.parent / outcome.results_file.name.replace('results_', 'samples_*_').replace('.json', '.jsonl')}"
        )


def _row(score: Score) -> tuple[str, ...]:
    value = f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
    chance = "" if score.chance is None else f"{score.chance:.4f}"
    return score.task, score.metric, value, chance, f"{score.answered} of {score.total}"

"""`main.py --capture_activations --benchmark mmlu`: run a benchmark, print the scores, say where things went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors
from AutomaticEval.errors import SelectionError

if TYPE_CHECKING:
    from AutomaticEval.evaluation.join import Score
    from AutomaticEval.evaluation.run import Outcome


@one_line_errors
def benchmark(
    context: typer.Context,
    capture_activations: Annotated[
        bool, typer.Option("--capture_activations", help="Keep the activations of every question.")
    ] = False,
    benchmark: Annotated[str, typer.Option("--benchmark", help="lm-eval tasks or groups, comma-separated.")] = "demo",
    model: options.Model = "demo",
    num_trials: Annotated[
        int | None, typer.Option("--num_trials", help="Questions, drawn over the whole benchmark.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num_fewshot", help="Examples before each question.")] = None,
    limit: Annotated[float | None, typer.Option("--limit", help="First so many documents of each task.")] = None,
    layers: options.Layers = None,
    sites: options.Sites = None,
    positions: Annotated[
        str | None, typer.Option("--positions", help="scored (default), all, prompt, response, last, or a slice.")
    ] = None,
    store_dtype: options.StoreDtype = None,
    compression: options.Compression = None,
    activation_save_dir: options.SaveDir = Path("activations"),
    output_path: Annotated[
        Path | None, typer.Option("--output_path", help="Folder for lm-eval's own results and samples files.")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include_path", help="Folder with task YAML files of your own.")
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch_size", help="A number, or auto.")] = "8",
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.LoadIn8Bit = False,
    load_in_4bit: options.LoadIn4Bit = False,
    revision: options.Revision = None,
) -> None:
    """Run language models on benchmarks and prompts, and keep their activations from the pass that answered.

    Without a command: run a benchmark through lm-evaluation-harness.
    """
    if context.invoked_subcommand is not None:
        return
    captures = capture_activations
    how = "--capture_activations"
    selection = options.chosen(sites, layers, positions, store_dtype, "scored", captures=captures, how=how)
    if compression is not None and not captures:
        raise SelectionError("--compression was given, but nothing is captured; add --capture_activations.")
    typer.echo("Loading …", err=True)
    options.quiet_libraries()
    from AutomaticEval.evaluation.benchmark import Benchmark
    from AutomaticEval.evaluation.run import run_benchmark
    from AutomaticEval.models.loading import LoadOptions, load_model, n_layers_of
    from AutomaticEval.store.sealing import check_compression

    check_compression(compression)
    asked = Benchmark(
        names=tuple(name.strip() for name in benchmark.split(",") if name.strip()),
        num_trials=num_trials,
        limit=limit,
        num_fewshot=num_fewshot,
        seed=seed,
        batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
        include_path=tuple(map(str, include_path or ())),
    )
    load = LoadOptions(dtype, device, device_map, load_in_8bit, load_in_4bit, revision)
    if selection is not None:
        selection.sites(n_layers_of(model, load))  # a wrong layer is refused before the weights load
    outcome = run_benchmark(
        load_model(model, options=load),
        asked,
        selection,
        save_dir=activation_save_dir,
        output_path=output_path,
        compression=compression,
        announce=lambda line: typer.echo(line, err=True),
    )
    _print(outcome, f"{benchmark} on {model}")


def _print(outcome: Outcome, title: str) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("Task", "Metric", "Score", "Chance", "Questions"):
        table.add_column(name, justify="left" if name in ("Task", "Metric") else "right")
    for score in outcome.scores:
        table.add_row(*_row(score))
    options.console().print(table)
    if outcome.folder is not None:
        from AutomaticEval.store.files import size_text

        typer.echo(f"Activations: {outcome.folder} ({outcome.n_samples} samples, {size_text(outcome.size_bytes)})")
        typer.echo(f"Load them:   from AutomaticEval import open_run; run = open_run({str(outcome.folder)!r})")
    if outcome.results_file is not None:
        typer.echo(f"Results:     {outcome.results_file}")


def _row(score: Score) -> tuple[str, ...]:
    value = f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
    chance = "" if score.chance is None else f"{score.chance:.4f}"
    return score.task, score.metric, value, chance, f"{score.answered} of {score.total}"

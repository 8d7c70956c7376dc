"""`main.py verify`, `merge`, `prune` and `index`: what is done to files and runs after they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import KEEP, MODEL, OUTPUT, command, options_of, quiet_libraries, refuse_unused, takes
from AutomaticEval.cli.printing import progress, say
from AutomaticEval.errors import SelectionError
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.options import options_in

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="The new .h5 file; an existing one is refused.", rich_help_panel=OUTPUT),
]


@command
@takes(load=LoadOptions)
def verify(
    context: typer.Context,
    path: options.File,
    load: LoadOptions,
    recompute: Annotated[
        int | None,
        typer.Option(
            "--recompute", min=1, metavar="N", help="Compute N random samples again, by a plain forward each."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="With --recompute: the model that made the run. Default: where it was on this machine, or the name in the run.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="With --recompute: seed for drawing the samples.")] = None,
) -> None:
    """Compute every checksum again, and compare every row with its token. Exits with 1 when anything is wrong."""
    if recompute is None:
        refuse_unused(
            context, "nothing is recomputed", "model", "seed", *options_in(LoadOptions), remedy="add --recompute N"
        )
    _verify_checksums(path)
    if recompute is not None:
        _recompute(path, recompute, model, seed, load)


def _verify_checksums(path: Path) -> None:
    from AutomaticEval.store.upkeep.sizes import files_of
    from AutomaticEval.store.upkeep.verify import verify as check

    with progress("Verifying", lambda: files_of(path)) as advance:
        problems = check(path, advance)
    for problem in problems:
        say(f"DamagedFile: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
    say(f"{path}: all checksums are right, and every row is its token's")


def _recompute(path: Path, n: int, model: str | None, seed: int | None, load: LoadOptions) -> None:
    quiet_libraries()
    from AutomaticEval.capture.recompute.recomputed_run import recompute

    done = recompute(path, model, n, seed=seed, options=load, tell=_above_the_bar)
    say(str(done))
    if done.different:
        raise typer.Exit(1)


def _above_the_bar(line: str) -> None:
    from tqdm import tqdm

    with tqdm.external_write_mode():
        say(line)


@command
@takes(written=options_of(RunOutput, "compression"))
def merge(
    paths: Annotated[list[Path], typer.Argument(help="Run folders or files.", metavar="RUN…")],
    output: Output,
    written: RunOutput,
) -> None:
    """Make one file of one run, or of several runs of the same model and selection."""
    from AutomaticEval.store.upkeep.merge import merge as join
    from AutomaticEval.store.upkeep.sizes import size_of

    with progress("Merging", lambda: sum(map(size_of, paths))) as advance:
        join(paths, output, compression=written.compression, advance=advance)
    _written(output)


@command
@takes(written=options_of(RunOutput, "compression"))
def prune(
    path: options.File,
    output: Output,
    written: RunOutput,
    sites: Annotated[
        str | None,
        typer.Option("--sites", help="Sites to keep. Default: all.", metavar="SITES", rich_help_panel=KEEP),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", help="Layers to keep, such as 0-2,-1. Default: all.", metavar="LAYERS", rich_help_panel=KEEP
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions",
            help="Positions to keep: all, prompt, response, scored, thinking, answer, last, or a slice. Default: all.",
            rich_help_panel=KEEP,
        ),
    ] = None,
) -> None:
    """Copy only some sites, layers or positions into a smaller file."""
    from AutomaticEval.store.reader import open_run
    from AutomaticEval.store.upkeep.prune import kept_keys
    from AutomaticEval.store.upkeep.prune import prune as cut
    from AutomaticEval.store.upkeep.sizes import size_of

    if (sites, layers, positions) == (None, None, None):
        raise SelectionError("nothing to drop; say what to keep with --sites, --layers or --positions.")
    run = open_run(path)
    kept = kept_keys(run, sites, layers)
    with progress("Pruning", lambda: size_of(path)) as advance:
        cut(
            path,
            output,
            sites=sites,
            layers=layers,
            positions=positions,
            compression=written.compression,
            advance=advance,
        )
    _written(output)
    left_out = [key for key in run.keys if key not in kept]
    if left_out:
        say(f"Left out: {', '.join(left_out)}")


@command
def index(path: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]) -> None:
    """Write run.h5 again from the shards of a run, also of a run that was cut short."""
    from AutomaticEval.store.upkeep.rebuild import rebuild_index

    _written(rebuild_index(path))


def _written(path: Path) -> None:
    from AutomaticEval.store.disk.whole_files import size_text

    say(f"Written: {path} ({size_text(path.stat().st_size)})")

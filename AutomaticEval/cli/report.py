"""`main.py report RUN [RUN2] -o report.html`: a run as one page that opens without a network, is served, or is handed to embedding-atlas."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli.finish import say_written
from AutomaticEval.cli.options import OUTPUT, RUN, command, refuse_unused
from AutomaticEval.cli.printing import say

if TYPE_CHECKING:
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
    from AutomaticEval.pages.result_files import Found
    from AutomaticEval.store.run import Run

ATLAS = "embedding-atlas"

Results = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        help="A file or folder of probe and lens results; may be repeated. Default: results, if it is there.",
        rich_help_panel=RUN,
    ),
]
Lens = Annotated[
    bool, typer.Option("--lens", help="Load the model: colour tokens by the lens's rank.", rich_help_panel=RUN)
]
Serve = Annotated[
    bool,
    typer.Option(
        "--serve",
        help="Show the page at an address of this machine, until Ctrl-C; rows of every question are read when it is chosen.",
        rich_help_panel=OUTPUT,
    ),
]
To = Annotated[
    str | None,
    typer.Option("--to", help=f"{ATLAS}: a Parquet file for that command.", metavar="TOOL", rich_help_panel=OUTPUT),
]
Site = Annotated[
    str | None,
    typer.Option(
        "--site",
        help="With --to: the site of the rows. Default: the last layer's residual stream.",
        rich_help_panel=RUN,
    ),
]
Position = Annotated[str, typer.Option("--position", help="With --to: the token of the rows.", rich_help_panel=RUN)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="The file. Default: report.html; with --to, atlas.parquet.", rich_help_panel=OUTPUT
    ),
]


@command
def report(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A run of questions.", metavar="RUN")],
    other: Annotated[Path | None, typer.Argument(help="Another run over the same questions.", metavar="RUN2")] = None,
    results: Results = None,
    lens: Lens = False,
    serve: Serve = False,
    to: To = None,
    site: Site = None,
    position: Position = "prompt[-1]",
    output: Output = None,
) -> None:
    """Write a page about a run: scores, probe, lens and every question, in one file that opens without a network."""
    from AutomaticEval.pages.result_files import results_of, usual_results
    from AutomaticEval.report.page.document import check_html
    from AutomaticEval.store.reader import open_run

    if to is not None:
        _check_atlas(context, to, other)
        _write_atlas(path, output or Path("atlas.parquet"), site, position)
        return
    refuse_unused(context, "no rows are written", "site", "position", remedy=f"add --to {ATLAS}")
    if serve:
        refuse_unused(context, "the page is served, and no file is written", "output")
    else:
        check_html(output := output or Path("report.html"))
    run, second = open_run(path), None if other is None else open_run(other)
    loaded = _model_of(run) if lens else None
    found = results_of(run, usual_results() if results is None else results)
    if output is None:
        _serve(run, second, found, loaded)
    else:
        _write_page(output, run, second, found, loaded)


def _model_of(run: Run) -> LoadedModel:
    from AutomaticEval.capture.recompute.recomputed_run import model_of
    from AutomaticEval.cli.options import quiet_libraries

    quiet_libraries()
    return model_of(run)


def _write_page(output: Path, run: Run, second: Run | None, found: Found, loaded: LoadedModel | None) -> None:
    from AutomaticEval.pages.run_page import run_page
    from AutomaticEval.report.page.document import write_html
    from AutomaticEval.store.disk.whole_files import size_text

    write_html(output, run_page(run, second, found, loaded))
    _say_left_out(found)
    say(f"Page:        {len(run.questions())} questions, {size_text(output.stat().st_size)}; open it in a browser")
    say_written(output)


def _serve(run: Run, second: Run | None, found: Found, loaded: LoadedModel | None) -> None:
    """Serve the page until Ctrl-C, which is how this ends."""
    from AutomaticEval.pages.served_page import served_page

    server = served_page(run, second, found, loaded)
    _say_left_out(found)
    say(f"Page:        {server.address}")
    say("Whoever on this machine knows this address reads the run. Ctrl-C ends it.")
    server.run()
    say("Ended.")


def _say_left_out(found: Found) -> None:
    for reasons in found.left_out.values():
        for reason in reasons:
            say(f"Left out:    {reason}")


def _check_atlas(context: typer.Context, to: str, other: Path | None) -> None:
    """Raises SelectionError for another tool, and for what has no place in its file."""
    from AutomaticEval.errors import SelectionError, did_you_mean

    if to != ATLAS:
        raise SelectionError(
            f"no tool {to!r}.{did_you_mean(to, [ATLAS])} --to writes for {ATLAS}; `main.py export` writes for other tools."
        )
    refuse_unused(context, f"a file for {ATLAS} holds rows and no page", "serve", "results", "lens")
    if other is not None:
        raise SelectionError(f"{other} was given, but a file for {ATLAS} is of one run; leave it out.")


def _write_atlas(path: Path, output: Path, site: str | None, position: str) -> None:
    from AutomaticEval.errors import SelectionError
    from AutomaticEval.pages.atlas import write_atlas
    from AutomaticEval.store.disk.whole_files import new_file, prepare_file
    from AutomaticEval.store.reader import open_run

    if output.suffix.lower() != ".parquet":
        raise SelectionError(f"-o {output} is no .parquet file; {ATLAS} reads one, such as atlas.parquet.")
    prepare_file(output, offer="")
    run = open_run(path)
    with new_file(output) as partial:
        made = write_atlas(run, partial, site, position)
    share = "" if made.share is None else f"; x and y hold {made.share:.0%} of the variance"
    say(f"Atlas:       {made.n} questions at {made.site}, {position}{share}")
    if made.n_off_map:
        say(f"{made.n_off_map} of them have an infinite number or NaN in their row, and no place on the map.")
    say_written(output)
    whole = f"{ATLAS} {shlex.quote(str(output))} --text prompt"
    say(f"Look at it:  {whole} --x x --y y")
    say(f"Or by UMAP:  {whole} --vector activation")

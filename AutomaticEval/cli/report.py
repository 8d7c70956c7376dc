"""`main.py report RUN [RUN2] -o report.html`: a run as one page that opens without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from AutomaticEval.cli.finish import say_written
from AutomaticEval.cli.options import OUTPUT, RUN, command
from AutomaticEval.cli.printing import say

FOLDER = Path("results")

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


@command
def report(
    path: Annotated[Path, typer.Argument(help="A run of questions.", metavar="RUN")],
    other: Annotated[Path | None, typer.Argument(help="Another run over the same questions.", metavar="RUN2")] = None,
    results: Results = None,
    has_lens: Lens = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .html file.", rich_help_panel=OUTPUT)] = Path(
        "report.html"
    ),
) -> None:
    """Write a page about a run: scores, probe, lens and every question, in one file that opens without a network."""
    from AutomaticEval.errors import SelectionError
    from AutomaticEval.pages.run_page import run_page
    from AutomaticEval.store.disk.whole_files import new_file, prepare_file, size_text
    from AutomaticEval.store.reader import open_run

    if output.suffix.lower() not in (".html", ".htm"):
        raise SelectionError(f"-o {output} is no .html file; the page is one file, such as report.html.")
    run, second = open_run(path), None if other is None else open_run(other)
    prepare_file(output)
    loaded = None
    if has_lens:
        from AutomaticEval.capture.recompute.recomputed_run import model_of
        from AutomaticEval.cli.options import quiet_libraries

        quiet_libraries()
        loaded = model_of(run)
    given = results if results is not None else [FOLDER] if FOLDER.is_dir() else []
    page = run_page(run, second, given, loaded)
    with new_file(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    say(f"Page:        {len(run.questions())} questions, {size_text(output.stat().st_size)}; open it in a browser")
    say_written(output)

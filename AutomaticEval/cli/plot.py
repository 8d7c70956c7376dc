"""`main.py plot`: figures of result files, as PNG or SVG; also known as `heads plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import OUTPUT, command
from AutomaticEval.cli.printing import say
from AutomaticEval.errors import SelectionError


@command
def plot(
    files: Annotated[list[Path], typer.Argument(help="Result files: probe.json, lens.json, sweep.json, …")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the figures. Default: beside each file.", rich_help_panel=OUTPUT
        ),
    ] = None,
    file_format: Annotated[
        str, typer.Option("--format", help="png, or svg for print.", metavar="FORMAT", rich_help_panel=OUTPUT)
    ] = "png",
    overwrite: options.Overwrite = None,
) -> None:
    """Draw the figures of result files again: probe.png, sweep_heatmap.png, top_heads.png, …"""
    from AutomaticEval.report.figures import check_figures, draw
    from AutomaticEval.store.disk.json_files import read_json
    from AutomaticEval.store.disk.overwriting import VERSION, parse_overwrite

    replaces = parse_overwrite(overwrite)
    if replaces == VERSION:
        raise SelectionError(
            "figures are replaced or not; write --overwrite alone, or name another folder with --output."
        )
    results = [(read_json(file), output or file.parent) for file in files]
    check_figures(results, file_format, overwrite=replaces)  # all, before the first is drawn
    for result, folder in results:
        for figure in draw(result, folder, file_format, overwrite=replaces):
            say(f"Written:     {figure}")

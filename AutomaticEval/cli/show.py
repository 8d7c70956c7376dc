"""`main.py show FILE`: what is in a file or a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

    from AutomaticEval.store.reader import Run


@one_line_errors
def show(
    path: Annotated[Path, typer.Argument(help="A file, or a run folder.", metavar="FILE")],
    sample: Annotated[int | None, typer.Option("--sample", help="Which sample of a run, from 0.")] = None,
) -> None:
    """Print what is in a file: prompt, response, settings, shapes, and statistics of each layer."""
    from AutomaticEval.errors import StoreError
    from AutomaticEval.store.files import PICKLE_SUFFIXES
    from AutomaticEval.store.reader import load_activations, open_run

    if path.suffix.lower() in PICKLE_SUFFIXES:
        _show_sample(load_activations(path))
        return
    run = open_run(path)
    if len(run) > 1 and sample is None:
        _show_run(run)
        return
    number = sample or 0
    if not -len(run) <= number < len(run):
        raise StoreError(f"{path} has no sample {number}; it holds {len(run)}, from 0.")
    _show_sample(run[number])


def _show_run(run: Run) -> None:
    from rich.table import Table

    typer.echo(repr(run))
    table = run.table()
    tasks = Table("Task", "Samples", "Documents", "Correct")
    for task, part in table.groupby("task") if "task" in table else [("", table)]:
        docs = part.drop_duplicates("doc_id") if "doc_id" in part else part
        known = [bool(one) for one in docs.get("correct", []) if one is not None]
        share = f"{sum(known) / len(known):.4f}" if known else "unknown"
        tasks.add_row(str(task), str(len(part)), str(len(docs)), share)
    options.console().print(tasks)
    first = run[0]["activations"]
    sites = Table("Site", "Width", "Dtype")
    for key in run.keys:
        sites.add_row(key, str(first[key].shape[1]), str(first[key].dtype).removeprefix("torch."))
    options.console().print(sites)
    typer.echo(f"One sample: python main.py show {run.path} --sample 0")


def _show_sample(data: dict[str, Any]) -> None:
    from rich.table import Table

    for name, value in data.items():
        if name not in ("activations", "tokens", "settings", "input_ids", "generated_ids", "token_ids", "positions"):
            typer.echo(f"{name}: {value}")
    settings = data.get("settings", {})
    typer.echo("settings: " + ", ".join(f"{name}={value}" for name, value in settings.items()))
    table = Table("Site", "Shape", "Dtype", "Mean", "Std", "Min", "Max", "Mean norm")
    for key, tensor in data["activations"].items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        table.add_row(key, "x".join(map(str, tensor.shape)), dtype, *statistics(tensor))
    options.console().print(table)


def statistics(tensor: Tensor) -> list[str]:
    """Mean, standard deviation, smallest and largest value, and the mean L2 norm of a row, as text."""
    if not len(tensor):
        return ["–"] * 5
    wide = tensor.double()
    numbers = (wide.mean(), wide.std(correction=0), wide.min(), wide.max(), wide.norm(dim=1).mean())
    return [f"{number.item():.4g}" for number in numbers]

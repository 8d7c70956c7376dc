"""`main.py experts RUN`: how the tokens of a run are shared among the experts of each layer, and which experts serve which task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.options import OUTPUT, RUN, OfLayers, command
from AutomaticEval.cli.printing import progress, say

if TYPE_CHECKING:
    from AutomaticEval.analysis.experts.load import GroupLoads, LayerLoad

FEW = 3
"""So many experts of a task are printed; the file has more."""


@command
def experts(
    path: Annotated[Path, typer.Argument(help="A run that kept expert_ids.", metavar="RUN")],
    layers: OfLayers = None,
    positions: Annotated[
        str,
        typer.Option("--positions", help="all, prompt, response, scored, last or a slice of one.", rich_help_panel=RUN),
    ] = "all",
    permutations: Annotated[
        int, typer.Option("--permutations", min=1, help="Permutations of the questions, for p.", rich_help_panel=RUN)
    ] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the permutations.", rich_help_panel=RUN)] = 42,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A .json file, or a folder for experts.json; the figure goes beside it.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("results"),
) -> None:
    """Measure how evenly the experts of a mixture are used, and which serve which task, or right answers, more than others."""
    from AutomaticEval.analysis.experts.load import expert_load
    from AutomaticEval.sites import kind_and_layer
    from AutomaticEval.store.reader import open_run

    run = open_run(path)
    file = output if output.suffix == ".json" else output / "experts.json"
    result_file(file.parent, file.name, "experts")
    n_layers = sum(kind_and_layer(key).kind == "expert_ids" for key in run.keys)
    with progress("Measuring", lambda: n_layers, of_bytes=False) as advance:
        result = expert_load(
            run, positions=positions, layers=layers, n_permutations=permutations, seed=seed, advance=advance
        )
    measured = result.measured
    where = "all positions that were kept" if positions == "all" else positions
    title = f"{measured['run']['model']}, {measured['n_questions']} questions, {measured['n_tokens']} tokens at {where}"
    tables = [_layers(title, measured["layers"])]
    for name, what, counts in (
        ("tasks", "Task against the others", "in, outside"),
        ("right_wrong", "Right against wrong answers", "right, wrong"),
    ):
        if measured[name]:
            tables.append(_groups(what, measured[name], counts))
    finish(file, result, *tables)
    if measured["n_again"]:
        say(f"Left out:    {measured['n_again']} questions with the prompt of an earlier one")
    if not measured["tasks"]:
        say(
            "No tasks:    the run has one task, or a task has fewer than 2 questions, so that no task is compared with others"
        )


def _layers(title: str, layers: Sequence[LayerLoad]) -> Table:
    rows = [
        (
            str(each.layer),
            f"{each.n_active} of {each.n_experts}",
            f"{each.even:.3f}",
            f"{each.largest:.3f} ({each.largest_expert})",
            str(each.n_unused),
            f"{each.effective_experts:.1f}",
        )
        for each in layers
    ]
    return Table(title, ("Layer", "Experts", "Even load", "Largest (expert)", "Unused", "As if even among"), rows)


def _groups(title: str, groups: Sequence[GroupLoads], counts: str) -> Table:
    rows = [
        (
            group.name if number == 0 else "",
            f"{group.n_in}, {group.n_out}" if number == 0 else "",
            str(group.n_significant) if number == 0 else "",
            f"{each.layer}:{each.expert}",
            f"{each.load:.3f}",
            f"{each.difference.mean:+.3f}",
            "–" if each.difference.interval is None else "[{:+.3f}, {:+.3f}]".format(*each.difference.interval),
            f"{each.difference.p:.3f}",
        )
        for group in groups
        for number, each in enumerate(group.experts[:FEW])
    ]
    columns = ("Questions", counts, "p < 0.05", "Layer:expert", "Load", "Difference", "95 % interval", "p")
    return Table(title, columns, rows)

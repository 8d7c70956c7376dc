"""`main.py geometry RUN [RUN2]`: the shape of a run's activations by layer, and how alike those of two runs are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.options import OUTPUT, RUN, OfLayers, OfToken, command
from AutomaticEval.cli.printing import progress, say

if TYPE_CHECKING:
    from AutomaticEval.analysis.geometry.geometry import PlaceShape

Sites = Annotated[
    str | None,
    typer.Option("--sites", help="Such as resid_post,mlp_out. Default: the residual stream.", rich_help_panel=RUN),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=4, help="So many questions, drawn. Default: 5000 at most.", rich_help_panel=RUN),
]
Scatter = Annotated[
    str | None,
    typer.Option("--scatter", help="The place whose components are drawn, such as layer_14.", rich_help_panel=RUN),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for drawing questions.", rich_help_panel=RUN)]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="A .json file, or a folder for geometry.json; the figures go beside it.",
        rich_help_panel=OUTPUT,
    ),
]


@command
def geometry(
    path: Annotated[Path, typer.Argument(help="A run of questions.", metavar="RUN")],
    other: Annotated[Path | None, typer.Argument(help="Another run over the same questions.", metavar="[RUN2]")] = None,
    sites: Sites = None,
    layers: OfLayers = None,
    position: OfToken = "prompt[-1]",
    limit: Limit = None,
    scatter: Scatter = None,
    seed: Seed = 42,
    output: Output = Path("results"),
) -> None:
    """Measure norms, likeness of layers, principal components and effective rank of a run, or of two beside each other."""
    from AutomaticEval.analysis.geometry.geometry import geometry as measured_geometry
    from AutomaticEval.store.reader import open_run
    from AutomaticEval.store.upkeep.prune import kept_keys

    run, second = open_run(path), None if other is None else open_run(other)
    keys = None if sites is None and layers is None else kept_keys(run, sites, layers)
    file = output if output.suffix == ".json" else output / "geometry.json"
    result_file(file.parent, file.name, "geometry")
    n_places = len(keys or run.keys) * 3 + (0 if second is None else 3 * len(second.keys))
    with progress("Measuring", lambda: n_places, of_bytes=False) as advance:
        result = measured_geometry(
            run, second, keys, position=position, limit=limit, scatter=scatter, seed=seed, advance=advance
        )
    measured = result.measured
    tables = [_shapes(f"{measured['run']['model']}, {measured['n_questions']} questions", measured["places"])]
    if second is not None:
        tables.append(_shapes(f"{measured['other']['model']}, the same questions", measured["other_places"]))
    finish(file, result, *tables)
    _say_few(measured["places"])
    same = [each.site for each in measured["places"] if not each.explained]
    if same:
        say(
            f"All alike:   {', '.join(same)}: every question has the same row there, so that there are no components and no rank."
        )
    reason = measured.get("between_runs", measured["between"]).get("no_cosine")
    if reason is not None:
        say(f"No cosine:   {reason}; CKA compares these.")
    if measured.get("n_other_prompts"):
        say(f"Left out:    {measured['n_other_prompts']} questions that were asked in other words")


def _say_few(places: list[PlaceShape]) -> None:
    few = [each for each in places if each.n <= each.width]
    if few:
        say(
            f"Few rows:    {few[0].n} rows of {few[0].width} numbers have a rank of {few[0].most_rank} at most; random rows of this size have an effective rank of "
            f"{few[0].random_effective_rank:.0f}. Compare places with each other, and not with the width."
        )


def _shapes(title: str, places: list[PlaceShape]) -> Table:
    rows = [
        (
            each.site,
            str(each.width),
            f"{each.norm.mean:.4g}",
            _number(each.effective_rank),
            f"{each.random_effective_rank:.1f}",
            _number(each.participation_ratio),
            f"{each.random_participation_ratio:.1f}",
            "" if not each.explained else f"{each.explained[0]:.3f}",
        )
        for each in places
    ]
    columns = (
        "Place",
        "Width",
        "Norm",
        "Effective rank",
        "if random",
        "Participation ratio",
        "if random",
        "First component",
    )
    return Table(title, columns, rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"

"""`main.py compare RUN_A RUN_B`: two runs over the same questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.options import OUTPUT, command
from AutomaticEval.cli.printing import say
from AutomaticEval.errors import SelectionError

if TYPE_CHECKING:
    from AutomaticEval.analysis.compare_runs import SiteLikeness, TaskChange
    from AutomaticEval.store.run import Run

SHOWN_FLIPS = 20
"""So many flipped questions are printed; the file has all."""

SaveDirection = Annotated[
    Path | None,
    typer.Option(
        "--save_direction",
        help="Write the mean row of RUN_B minus that of RUN_A as a direction: a .safetensors file.",
        rich_help_panel=OUTPUT,
    ),
]
Layer = Annotated[
    str | None,
    typer.Option("--layer", help="The direction's layer or layers, such as 14 or 10-14.", rich_help_panel=OUTPUT),
]


@command
def compare(
    before: Annotated[Path, typer.Argument(help="A run, such as the base model's.", metavar="RUN_A")],
    after: Annotated[Path, typer.Argument(help="Another run over the same questions.", metavar="RUN_B")],
    seed: Annotated[
        int, typer.Option("--seed", help="Seed for drawing the questions whose activations are compared.")
    ] = 42,
    save_direction: SaveDirection = None,
    layer: Layer = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A .json file, or a folder for compare.json; the figure goes beside it.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("results"),
) -> None:
    """Compare two runs over the same questions: the change of the score, the questions that flipped, and how alike the activations are."""
    if (save_direction is None) != (layer is None):
        raise SelectionError(
            "--save_direction FILE and --layer N go together: the direction is of resid_post in these layers."
        )
    from AutomaticEval.analysis.compare_runs import compare_runs
    from AutomaticEval.store.reader import open_run

    runs = open_run(before), open_run(after)
    file = output if output.suffix == ".json" else output / "compare.json"
    result_file(file.parent, file.name, "runs")
    if save_direction is not None and layer is not None:
        _save_direction(save_direction, layer, *runs)
    result = compare_runs(*runs, seed=seed)
    measured = result.measured
    for when in ("before", "after"):
        edits = "; ".join(measured[when].get("edits") or ())
        say(
            f"{when.capitalize() + ':':8}{measured[when]['model']} ({measured[when]['path']}){', edited: ' + edits if edits else ''}"
        )
    if not measured["tasks"]:
        say("No scores:   no question has a verdict in both runs.")
    tables = (_scores(measured["tasks"]), _flips(measured["flips"]), _sites(measured["sites"]))
    finish(file, result, *(table for table in tables if table.rows))
    if measured["tasks"] and not measured["flips"]:
        say("Flipped:     no question")
    if not measured["sites"]:
        say(
            "No rows:     none are compared: the runs share no site at the question's last token (expert_ids are names: see `experts RUN`)"
        )
    if measured["agreement"] is not None:
        say(f"Same answer:  {measured['agreement']:.4f} of the questions")
    for count, where in (("n_only_before", before), ("n_only_after", after)):
        if measured[count]:
            say(f"Left out:     {measured[count]} questions that only {where} has")
    if measured["n_other_prompts"]:
        say(f"Other prompts: {measured['n_other_prompts']} questions, whose activations are not compared")


def _save_direction(file: Path, layer: str, before: Run, after: Run) -> None:
    """Write the direction from the first run to the second, one for each of the layers."""
    from AutomaticEval.analysis.steering.difference import difference_of_runs
    from AutomaticEval.analysis.steering.direction import save_directions
    from AutomaticEval.sites import expand, kind_and_layer

    kept = [site.layer for site in map(kind_and_layer, before.keys) if site.layer is not None]
    n_layers = (before.settings.get("shape") or {}).get("n_layers") or max(kept, default=-1) + 1
    directions = difference_of_runs(before, after, [site.key for site in expand(["resid_post"], layer, n_layers)])
    save_directions(file, directions)
    for each in directions:
        say(f"Direction:   {each.told}")
    say(f"Written:     {file} (python main.py steer --direction {file} …)")


def _scores(tasks: list[TaskChange]) -> Table:
    rows = []
    for each in tasks:
        known = (
            each.difference.interval if each.n_gained or each.n_lost else None
        )  # without a flip there is nothing to draw
        interval = "" if known is None else "[{:+.4f}, {:+.4f}]".format(*known)
        change = f"{each.difference.mean:+.4f} {interval}"
        numbers = (str(each.n), f"{each.before:.4f}", f"{each.after:.4f}", change)
        p = ["" if value is None else f"{value:.3g}" for value in (each.p, each.p_corrected)]
        rows.append((each.task, *numbers, f"+{each.n_gained} -{each.n_lost}", *p))
    columns = ("Task", "Questions", "Before", "After", "Change, 95 % interval", "Flipped", "p", "corrected")
    return Table("Answered rightly", columns, rows)


def _flips(flips: list[dict[str, object]]) -> Table:
    rows = [
        (str(each["task"]), str(each["doc_id"]), f"{each['before']} → {each['after']}", str(each["now"]))
        for each in flips[:SHOWN_FLIPS]
    ]
    title = f"Flipped: {len(flips)}" + (f", of which the first {SHOWN_FLIPS}" if len(flips) > SHOWN_FLIPS else "")
    return Table(title, ("Task", "Document", "Answer", "Now"), rows)


def _sites(sites: list[SiteLikeness]) -> Table:
    rows = [
        (
            each.site,
            "" if each.cosine is None else f"{each.cosine.mean:.4f}",
            "" if each.cka is None else f"{each.cka:.4f}",
        )
        for each in sites
    ]
    return Table("At the question's last token", ("Site", "Cosine", "CKA"), rows)

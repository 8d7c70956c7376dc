"""`main.py probe RUN`: whether, and where, activations tell right answers from wrong ones, beside baselines and an audit of leaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.going_on import going_on
from AutomaticEval.cli.options import OUTPUT, RUN, OfLayers, command, refuse_unused
from AutomaticEval.cli.printing import progress_of_work, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from AutomaticEval.analysis.probes.across.transfer import Transfer
    from AutomaticEval.analysis.probes.grid.positions import LeftOut
    from AutomaticEval.analysis.probes.judged import Judged
    from AutomaticEval.analysis.probes.leaks.audit import Finding
    from AutomaticEval.analysis.result import Estimate, Result
    from AutomaticEval.store.run import Run

NUMBERS = ("AUROC, 95 % interval", "Best - this", "Accuracy", "Brier")

TargetName = Annotated[
    str,
    typer.Option("--target", help="correct, answer, task or a column of questions.", rich_help_panel=RUN),
]
Positive = Annotated[
    str | None,
    typer.Option(
        "--positive",
        help="The value that is told from all others. Without it, up to 20 values are told apart.",
        rich_help_panel=RUN,
    ),
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="The questions of one task of the run.", rich_help_panel=RUN)
]
Sites = Annotated[
    str | None,
    typer.Option("--sites", help="Such as resid_post,mlp_out. Default: all of the run.", rich_help_panel=RUN),
]
Position = Annotated[
    str,
    typer.Option(
        "--position", help="A token: prompt[-1], prompt[-3], exact_answer[-1]; or several.", rich_help_panel=RUN
    ),
]
Grid = Annotated[
    bool,
    typer.Option("--grid", help="Every site at all usual positions of prompt and response.", rich_help_panel=RUN),
]
RandomModel = Annotated[
    bool,
    typer.Option(
        "--random_model",
        help="One more baseline: the same model with random weights.",
        rich_help_panel=RUN,
    ),
]
Split = Annotated[
    str,
    typer.Option("--split", help="question: equal prompts in one fold; task: whole tasks.", rich_help_panel=RUN),
]
Folds = Annotated[int, typer.Option("--folds", help="Each question is judged in one of them.", rich_help_panel=RUN)]
Repeats = Annotated[int, typer.Option("--repeats", help="How often folds are drawn anew.", rich_help_panel=RUN)]
Seed = Annotated[int, typer.Option("--seed", help="Seed for folds and shuffled labels.", rich_help_panel=RUN)]
Further = Annotated[
    str | None,
    typer.Option(
        "--transfer",
        help="Further runs of the model, with commas: each run's probes are judged on each.",
        metavar="RUN2,RUN3",
        rich_help_panel=RUN,
    ),
]
SaveDirection = Annotated[
    Path | None,
    typer.Option(
        "--save_direction",
        help="Write the difference of means at the best place as a direction: a .safetensors file.",
        rich_help_panel=OUTPUT,
    ),
]
SaveProbe = Annotated[
    Path | None,
    typer.Option(
        "--save_probe",
        help="Write a probe of all questions at the best place, for probe_score: a .safetensors file.",
        rich_help_panel=OUTPUT,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="A .json file, or a folder for probe.json; the figure goes beside it.",
        rich_help_panel=OUTPUT,
    ),
]


@command
def probe(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A run of questions.", metavar="RUN")],
    target: TargetName = "correct",
    positive: Positive = None,
    task: TaskName = None,
    sites: Sites = None,
    layers: OfLayers = None,
    position: Position = "prompt[-1]",
    grid: Grid = False,
    split: Split = "question",
    folds: Folds = 5,
    repeats: Repeats = 1,
    seed: Seed = 42,
    transfer: Further = None,
    random_model: RandomModel = False,
    save_direction: SaveDirection = None,
    save_probe: SaveProbe = None,
    output: Output = Path("results"),
) -> None:
    """Probe every layer of a run for a class of questions, with baselines and an audit of leaks.

    The same command, given again, goes on where it was cut short.
    """
    from AutomaticEval.analysis.probes.parts.kept_places import remove_places
    from AutomaticEval.analysis.probes.probe import probe as probed
    from AutomaticEval.store.reader import open_run
    from AutomaticEval.store.upkeep.prune import kept_keys

    if grid:
        refuse_unused(context, "--grid has positions of its own; several of --position are a grid, too", "position")
    run = open_run(path) if task is None else open_run(path).where(task=task)
    keys = None if sites is None and layers is None else kept_keys(run, sites, layers)
    file = output if output.suffix == ".json" else output / "probe.json"
    parts = output.with_suffix(".parts") if output.suffix == ".json" else output / "probe"
    result_file(file.parent, file.name, "probe", parts)
    _check_saved(run, target, positive, save_direction, save_probe)
    others = [open_run(Path(each.strip()).expanduser()) for each in (transfer or "").split(",") if each.strip()]
    with going_on(parts), progress_of_work("Probing") as (advance, expect):
        result = probed(
            run,
            target,
            keys,
            positive=positive,
            position=None if grid else position,
            grid=grid,
            split=split,
            n_folds=folds,
            n_repeats=repeats,
            seed=seed,
            transfer=others,
            random_model=random_model,
            folder=parts,
            advance=advance,
            expect=expect,
        )
    if task is not None:
        result = replace(result, settings={**(result.settings or {}), "task": task})
    _say_findings(result.measured["findings"])
    _say_best(result)
    _say_left_out(result.measured.get("grid", {}).get("left_out", ()))
    if save_direction is not None:
        _save_direction(save_direction, run, result)
    if save_probe is not None:
        _save_probe(save_probe, run, result)
    further = [_transfer(result.measured["transfer"])] if others else []
    finish(file, result, *_by_class(result), _places(result), _baselines(result), *further)
    remove_places(parts)


def _say_findings(findings: Sequence[Finding]) -> None:
    """What is wrong, before any number."""
    for each in findings:
        say(f"Finding:     {each.text}", is_grave=each.is_grave)
    if not findings:
        say("Audit:       no leak was found.")


def _say_best(result: Result) -> None:
    from AutomaticEval.analysis.probes.leaks.audit import number
    from AutomaticEval.report.probes.classes import classes_told, measure_told

    classes, best = result.measured["classes"], result.measured["best"]
    left_out = f", {classes['n_left_out']} without a value left out" if classes["n_left_out"] else ""
    say(f"Classes:     {classes['target']}: {classes_told(classes)}{left_out}")
    places = ", ".join(f"{key} in {n}" for key, n in best["places"].items())
    of_folds = f" of {sum(best['places'].values())}"
    say(
        f"Best place:  {measure_told(classes)} {number(best['judged'].auroc)}; chosen inside the training folds: {places}{of_folds}"
    )
    if len(result.measured["places"]) > 1:
        say(
            "             (This AUROC is of choosing a place in each fold. A line of the table is one place in all folds.)"
        )


def _say_left_out(left_out: Sequence[LeftOut]) -> None:
    for each in left_out:
        say(f"Left out:    {each.position}: {each.reason}")


def _check_saved(run: Run, target: str, positive: str | None, direction: Path | None, probe: Path | None) -> None:
    """What would refuse a file that is to be saved is told before anything is probed."""
    from AutomaticEval.analysis.probes.target import refuse_several, target_of
    from AutomaticEval.analysis.tensor_file import DIRECTION, PROBE
    from AutomaticEval.store.reading.reduced_runs import refuse_reduced

    files = ((direction, DIRECTION, "a direction", "--save_direction"), (probe, PROBE, "a saved probe", "--save_probe"))
    for file, kind, what, option in files:
        if file is not None:
            kind.prepare(file.expanduser(), offer="")
            refuse_reduced(run.settings, what)
            refuse_several(target_of(run.questions(), target, positive), option)


def _save_direction(file: Path, run: Run, result: Result) -> None:
    from AutomaticEval.analysis.steering.of_probe import best_direction

    direction = best_direction(run, result)
    direction.save(file)
    say(f"Direction:   {direction.told}")
    _say_direction(direction.made_from["auroc"], direction.made_from["p"])
    say(f"Written:     {file} (python main.py steer --direction {file} …)")


def _say_direction(auroc: float | None, p: float | None) -> None:
    """How well the difference of means tells the classes apart at its place."""
    if auroc is None:
        return
    told = "" if p is None else f", p {p:.3f}"
    chance = ": p is above 0.05, so that chance alone may give it" if p is not None and p > 0.05 else ""
    say(f"             AUROC along it, out of fold: {auroc:.3f}{told}{chance}")


def _save_probe(file: Path, run: Run, result: Result) -> None:
    from AutomaticEval.analysis.probes.saved.chosen_place import chosen_place
    from AutomaticEval.analysis.probes.saved.learned_on_all import learn_probe

    made = learn_probe(run, result)
    made.save(file)
    place = chosen_place(result)
    say(f"Probe:       {place.name}, {made.n_questions} questions, C {made.strength:g}")
    say(f"             {place.told}; this place alone has AUROC {_number(place.judged.probe.auroc)}, out of fold")
    say(f"Written:     {file} (python main.py probe_score {file} …)")


def _by_class(result: Result) -> list[Table]:
    """Of several classes, how well each is told from the rest."""
    counts = result.measured["classes"].get("counts")
    if counts is None:
        return []
    rows = [(name, str(counts[name]), _number(each)) for name, each in result.measured["best"]["by_class"].items()]
    return [Table("By class, at the best place", ("Class", "Questions", "AUROC against the rest"), rows)]


def _places(result: Result) -> Table:
    """Of a grid those at the position of the place that folds chose most often; the file and a figure have all."""
    position, places = result.measured["best"]["position"], result.measured["places"]
    rows = [
        (each.site, *_numbers(each.probe), _number(each.difference_of_means), "" if each.p is None else f"{each.p:.3f}")
        for each in places
        if each.position == position
    ]
    of_all = f" at {position} (probe_grid.png has all {len(places)} places)" if len(rows) < len(places) else ""
    return Table(f"Logistic probe{of_all}", ("Place", *NUMBERS, "Difference of means", "p"), rows)


def _baselines(result: Result) -> Table:
    rows = [
        (each.told, *(_numbers(each.judged) if each.judged else (each.reason or "", "", "", "")))
        for each in result.measured["baselines"]
    ]
    return Table("Without activations", ("Baseline", *NUMBERS), rows)


def _transfer(told: Mapping[str, Any]) -> Table:
    """A row for each run that was learned from, a column for each that is judged."""
    runs, cells = told["runs"], told["cells"]
    names = [f"{number}: {each['path']}" for number, each in enumerate(runs, 1)]
    rows = [
        (f"{name} ({next(iter(run['places']))})", *(_cell(each) for each in cells if each.train == number))
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    return Table("AUROC of a run's probes (rows) on a run (columns)", ("Learned from", *names), rows)


def _cell(each: Transfer) -> str:
    shared = f"; {each.n_shared} in both" if each.n_shared else ""
    return _number(each.auroc) + shared + (f", {each.n_left_out} left out" if each.n_left_out else "")


def _numbers(judged: Judged) -> tuple[str, ...]:
    below = "" if judged.below_best is None else _number(judged.below_best, "+")
    return _number(judged.auroc), below, f"{judged.accuracy.mean:.3f}", f"{judged.brier.mean:.3f}"


def _number(estimate: Estimate, sign: str = "") -> str:
    from AutomaticEval.analysis.probes.leaks.audit import number

    return number(estimate, sign)

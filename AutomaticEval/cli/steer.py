"""`main.py steer`: what becomes of scores and answers when a direction is added at several scales."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.cli import options
from AutomaticEval.cli.at_scale import Measuring
from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.interventions import OwnTexts, Prompts, Sentiment, asked_prompts, metrics_of, number
from AutomaticEval.cli.options import RUN, command, options_of, refuse_unused, takes
from AutomaticEval.cli.printing import say
from AutomaticEval.errors import PromptError, SelectionError
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.public_names import public_name

if TYPE_CHECKING:
    from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
    from AutomaticEval.analysis.result import Result
    from AutomaticEval.analysis.steering.direction import Direction
    from AutomaticEval.analysis.words.metrics import TextMetric

SHOWN_PROMPTS = 5
"""The answers to so many prompts are printed; the file has all."""
OF_BENCHMARK = (
    "limit",
    "num_fewshot",
    "scoring",
    "include_path",
    "benchmark_data",
    "apply_chat_template",
    "system_instruction",
    "gen_kwargs",
)

DirectionFile = Annotated[
    Path,
    typer.Option(
        "--direction", help="A direction file; or a .safetensors or .npy file with one vector.", rich_help_panel=RUN
    ),
]
Scale = Annotated[
    str, typer.Option("--scale", help="Multiples of the vector as it is stored, such as -4,0,4.", rich_help_panel=RUN)
]
SiteName = Annotated[
    str | None, typer.Option("--site", help="Such as resid_post. Default: the file's.", rich_help_panel=RUN)
]
Layer = Annotated[
    str | None,
    typer.Option("--layer", help="A layer or several, such as 14 or 10-14. Default: the file's.", rich_help_panel=RUN),
]
PositionsOption = Annotated[
    str,
    typer.Option("--positions", help="all, prompt, response, scored, last or a slice of one.", rich_help_panel=RUN),
]


@command
@takes(
    prompts=Prompts,
    sampling=options_of(Sampling, "max_new_tokens", "temperature", "seed", max_new_tokens=15),
    asked=options_of(Benchmark, "benchmark", "num_trials", "batch_size", *OF_BENCHMARK),
    load=LoadOptions,
)
def steer(
    context: typer.Context,
    prompts: Prompts,
    sampling: Sampling,
    asked: Benchmark | None,
    load: LoadOptions,
    direction: DirectionFile,
    scale: Scale,
    site: SiteName = None,
    layer: Layer = None,
    positions: PositionsOption = "all",
    model: options.Model = "demo",
    texts: OwnTexts = None,
    sentiment: Sentiment = "vader",
    batch_size: options.BatchSize = 8,
    output: options.Results = Path("results"),
) -> None:
    """Add a direction to a model at several scales, and measure benchmark scores and answers at each.

    The same command, given again, goes on where it was cut short.
    """
    if asked is None:
        refuse_unused(context, "it is of a --benchmark", *OF_BENCHMARK)
    if prompts.category is None and texts is None:
        refuse_unused(context, "it is of prompts, and none are asked", "max_new_tokens", "temperature")
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
    from AutomaticEval.analysis.made_with import AnalysisSettings, TextsRead
    from AutomaticEval.analysis.steering.at_scales import Steering, parse_scales
    from AutomaticEval.analysis.words.wording import wording
    from AutomaticEval.evaluation.benchmark import load_tasks
    from AutomaticEval.models.edited_positions import positions_of
    from AutomaticEval.models.loading import load_model

    scales, places = parse_scales(scale), positions_of(positions)
    file = result_file(output, "steer.json", "steering", output / "steer")
    directions = _directions(direction, site, layer, model, load)
    profile = prompts.load_profile()
    questions = prompts.drawn(asked_prompts(profile, prompts.category, texts))
    _refuse(questions, asked)
    tasks = None
    if asked is not None:
        options.tell_of_code(asked, partial(say, err=True))
        tasks = load_tasks(asked)  # what is wrong with a task is told before a large model loads
    words = prompts.keywords(profile)
    metrics = [*metrics_of(sentiment, words), *wording()]
    steering = Steering(load_model(model, options=load), directions, places)
    measuring = Measuring(steering, metrics, questions, sampling, batch_size, asked, tasks)
    for each in directions:
        say(f"Direction:   {each.told}")
    folder = SweepFolder(output / "steer", measuring.settings() | {"sentiment": sentiment, "keywords": words})
    folder.check_settings()
    parts = _measured(folder, scales, measuring)
    profile_name = prompts.profile and public_name(prompts.profile)
    named = {"file": direction.name, "profile": profile_name, "emotion": prompts.category, "scales": scales}
    read = {"prompts": TextsRead.of(questions, texts or f"{profile_name}, {prompts.category}")} if questions else {}
    of_directions = {each.at.key: each.about() for each in directions}
    told = {**folder.settings, **named, "directions": of_directions, "num_trials": prompts.num_trials}
    about = AnalysisSettings.of(steering.loaded, read, batch_size=batch_size, seed=prompts.seed, options=told)
    result = _result(parts, questions, metrics, about.as_dict())
    finish(file, result, *_tables(result))


def _directions(file: Path, site: str | None, layer: str | None, model: str, load: LoadOptions) -> list[Direction]:
    """The directions that are added. A wrong layer is refused before the weights load."""
    from AutomaticEval.analysis.steering.direction import load_directions
    from AutomaticEval.models.loading import n_layers_of
    from AutomaticEval.sites import expand

    layers = None
    if layer is not None:
        layers = [int(each.layer or 0) for each in expand(["resid_post"], layer, n_layers_of(model, load))]
    return load_directions(file, site=site, layers=layers)


def _refuse(questions: Sequence[str], asked: Benchmark | None) -> None:
    """Raises PromptError when nothing is asked, SelectionError for several processes, which would write the same files."""
    from AutomaticEval.processes import join_ranks

    if not questions and asked is None:
        raise PromptError("nothing is asked: give --benchmark, --texts, or --profile with --category.")
    if join_ranks().n_ranks > 1:
        raise SelectionError("steer runs in one process; start it without torchrun or accelerate launch.")


def _measured(folder: SweepFolder, scales: Sequence[float], measuring: Measuring) -> list[dict[str, Any]]:
    """What is measured at each scale, read from the folder where it is there already. Whatever cuts it short is told how to go on."""
    from AutomaticEval.processes import command_line

    names = {scale: f"scale_{scale!r}" for scale in scales}
    parts: list[dict[str, Any]] = []
    try:
        for scale, name in names.items():
            told = ": is there already" if folder.has(name) else ""
            say(f"Scale {scale:g} ({len(parts) + 1} of {len(scales)}){told}", err=True)
            parts.append(folder.part(name, partial(measuring.at, scale)))
    except (KeyboardInterrupt, SystemExit):
        there = sum(map(folder.has, names.values()))
        how = f"To go on:\n  {command_line(*sys.argv[1:])}"
        say(f"\nCut short; {there} of {len(scales)} scales are in {folder.path}. {how}", err=True)
        raise
    return parts


def _result(
    parts: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    metrics: Sequence[TextMetric],
    settings: Mapping[str, Any],
) -> Result:
    from AutomaticEval.analysis.result import Result

    rows = {
        name: [{"scale": part["scale"], **row} for part in parts for row in part[name]]
        for name in ("benchmark", "texts")
    }
    samples = [
        {"prompt": prompt, "answers": [{"scale": part["scale"], "text": part["answers"][n]} for part in parts]}
        for n, prompt in enumerate(prompts)
    ]
    units = {metric.name: metric.unit for metric in metrics}
    return Result("steering", {**rows, "units": units, "samples": samples}, settings)


def _tables(result: Result) -> list[Table]:
    """The scores, the text metrics and some answers, each by scale; only those that there are."""
    from AutomaticEval.analysis.result import Estimate

    scores, texts, samples = (result.measured[name] for name in ("benchmark", "texts", "samples"))
    tables = []
    if scores:
        rows = [
            (each["task"], each["metric"], f"{each['scale']:g}", _score(each), str(each["n"]))
            for each in _by_task(scores)
        ]
        tables.append(Table("Scores by scale", ("Task", "Metric", "Scale", "Score", "Questions"), rows, 2))
    if texts:
        rows = [
            (
                each["task"],
                each["metric"],
                f"{each['scale']:g}",
                number(Estimate(each["mean"], each["interval"], each["n"])),
                str(each["n"]),
            )
            for each in _by_task(texts)
        ]
        columns = ("Task", "Metric", "Scale", "Mean (95 % interval)", "Texts")
        tables.append(Table("Text metrics by scale", columns, rows, 2))
    if samples:
        told = f", the first {SHOWN_PROMPTS} of {len(samples)} prompts" if len(samples) > SHOWN_PROMPTS else ""
        shown = [
            ("" if n else sample["prompt"], f"{each['scale']:g}", each["text"].strip())
            for sample in samples[:SHOWN_PROMPTS]
            for n, each in enumerate(sample["answers"])
        ]
        tables.append(Table(f"Answers by scale{told}", ("Prompt", "Scale", "Answer"), shown, 3))
    return tables


def _by_task(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a task and metric below one another, in the order of the first scale."""
    places = list(dict.fromkeys((each["task"], each["metric"]) for each in rows))
    return sorted(rows, key=lambda each: places.index((each["task"], each["metric"])))


def _score(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "none"
    return f"{row['value']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] is not None else "")

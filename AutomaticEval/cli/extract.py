"""`main.py extract`: the activations of labelled prompts, of a file of texts, or of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.cli import options
from AutomaticEval.cli.options import KEEP, MODEL, OUTPUT, command, given_arguments, options_of, refuse_unused, takes
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import OtherSettings, SelectionError, StoreError
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.options import Option
from AutomaticEval.selection import Selection

if TYPE_CHECKING:
    from AutomaticEval.capture.texts.many_runs import Plan, Unit
    from AutomaticEval.capture.texts.text_set import TextSet
    from AutomaticEval.processes import Ranks


@dataclass(frozen=True)
class WhichTexts:
    """Which texts are fed: those of a profile, of a file, or of a data set."""

    profile: Annotated[str | None, Option("baseline, extended, or a .toml file: labelled prompts, and models.")] = None
    texts: Annotated[Path | None, Option("File of texts: JSONL, JSON, CSV, TSV, parquet or txt, also .gz.")] = None
    dataset: Annotated[str | None, Option("A Hugging Face data set, streamed; or a local folder.")] = None
    category: Annotated[str | None, Option("Categories of the profile, comma-separated. Default: all.")] = None
    text_field: Annotated[
        str | None, Option("Field that holds the text. Default: text, input, question or prompt.")
    ] = None
    dataset_config: Annotated[str | None, Option("Configuration of the data set.")] = None
    split: Annotated[str, Option("Split of the data set.")] = "train"
    limit: Annotated[int | None, Option("The first so many texts; of a profile, of each category.", minimum=1)] = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.profile, self.texts, self.dataset)) != 1:
            raise SelectionError("which texts? Give one of --profile, --texts and --dataset.")
        if self.profile is None and self.category is not None:
            raise SelectionError("--category names a category of a --profile; leave it out.")


PositionsText = Annotated[
    str, typer.Option("--positions", help="Positions: all, last, or a slice.", rich_help_panel=KEEP)
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder of the run, or of the runs of several models or categories. An extraction that was cut short there goes on. "
        "Default: a new one below --activation_save_dir, named after the texts, the model and the time.",
        rich_help_panel=OUTPUT,
    ),
]


Sites = Annotated[
    str,
    typer.Option(
        "--sites",
        help="Sites to keep; also pattern: attention after softmax.",
        metavar="SITES",
        rich_help_panel=KEEP,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Hub names, folders, or demo, comma-separated. Default: the profile's.",
        rich_help_panel=MODEL,
    ),
]


def _refuse_ignored(
    context: typer.Context, profile: str | None, dataset: str | None, output: Path | None, **others: object
) -> None:
    """Raises SelectionError for options that would be ignored."""
    if dataset is None:
        refuse_unused(context, "it is of a --dataset", "dataset_config", "split")
    if profile is not None:
        refuse_unused(context, "the texts of a --profile have no fields", "text_field")
    if output is not None:
        refuse_unused(context, "--output says where the activations go", "activation_save_dir")


@command
@takes(
    _refuse_ignored,
    which=WhichTexts,
    feeding=Feeding,
    selection=options_of(Selection, "layers", "store_dtype", "reduce", "project"),
    load=LoadOptions,
    written=options_of(RunOutput, "compression"),
)
def extract(
    context: typer.Context,
    which: WhichTexts,
    feeding: Feeding,
    selection: Selection,
    load: LoadOptions,
    written: RunOutput,
    sites: Sites = "embed,resid_post,mlp_out",
    model: Model = None,
    positions: PositionsText = "all",
    output: Output = None,
    activation_save_dir: options.SaveDir = Path("activations"),
    mlflow: options.Mlflow = None,
) -> None:
    """Capture texts without generating: each token is computed once, and no layer above the deepest one that is kept.

    An extraction that is cut short prints the command that goes on.
    """
    if which.profile is None and model is None:
        raise SelectionError("--texts and --dataset take a --model.")
    options.quiet_libraries()
    from AutomaticEval.capture.texts.many_runs import Plan, extract_sets
    from AutomaticEval.processes import command_line, join_ranks
    from AutomaticEval.report.mlflow_run import require_mlflow
    from AutomaticEval.store.hdf5.write import check_compression

    if mlflow is not None:
        require_mlflow()
    check_compression(written.compression)
    ranks = join_ranks()
    kinds = [kind.strip() for kind in sites.split(",")]
    selection = Selection.parse(
        [kind for kind in kinds if kind != "pattern"] or "resid_post",
        selection.layers_text(),
        positions,
        selection.store_dtype,
        selection.reduce,
        selection.project,
    )
    plan = Plan(selection, replace(feeding, patterns="pattern" in kinds), load, written.compression, ranks)
    name, sets, models = _sets(which, strict=feeding.strict)
    models = [each.strip() for each in (model or "").split(",") if each.strip()] or models
    if not models:
        raise SelectionError("no model is named; give --model.")
    log = options.Log(speaks=ranks.is_first)
    root, folder_of = _folders(which, output, partial(_new_folder, ranks, activation_save_dir), name, sets, models)
    again = command_line("extract", *given_arguments(context, "output", "activation_save_dir"), "--output", str(root))
    try:
        units = extract_sets(models, sets, plan, folder_of, log)
    except (KeyboardInterrupt, SystemExit, StoreError) as failure:
        if not isinstance(failure, OtherSettings) and next(root.rglob("shard-*"), None) is not None:
            log(f"\nThe extraction was cut short. To go on:\n  {again}")
        raise
    if ranks.is_first:
        _finish(units, name, root, plan, mlflow, log)
        if any(unit.status == "failed" for unit in units):
            log(f"To make what is missing, once its cause is gone:\n  {again}")
            raise typer.Exit(1)


def _new_folder(ranks: Ranks, save_dir: Path, name: str) -> Path:
    """A new folder named after the time, which the first process makes for all."""
    from AutomaticEval.store.disk.whole_files import stamped_folder

    return ranks.from_first(stamped_folder(save_dir, name) if ranks.is_first else None)


def _folders(
    which: WhichTexts,
    output: Path | None,
    new_folder: Callable[[str], Path],
    name: str,
    sets: list[TextSet],
    models: list[str],
) -> tuple[Path, Callable[[str, str], Path]]:
    """The folder of the whole extraction, and a function that gives the run folder of a model and a set of texts."""
    from AutomaticEval.capture.texts.many_runs import folder_names

    places, parts = folder_names(models), folder_names([each.name for each in sets])
    own_name = name if which.profile is not None else f"{parts.get(name, name)}_{places[models[0]]}"
    root = output or new_folder(own_name)

    def folder_of(model: str, texts: str) -> Path:
        if which.profile is not None:
            return root / f"{places[model]}_{parts[texts]}"
        return root / places[model] if len(models) > 1 else root

    return root, folder_of


def _sets(which: WhichTexts, *, strict: bool) -> tuple[str, list[TextSet], list[str]]:
    """The name of the texts, the sets of texts that get a run each, and the models that a profile names."""
    from AutomaticEval.capture.texts.sources import DatasetTexts, FileTexts, name_of_texts
    from AutomaticEval.capture.texts.text_set import TextSet

    if which.profile is not None:
        return _of_profile(which.profile, which.category, which.limit)
    if which.texts is not None:
        file = which.texts
        texts = FileTexts(file, which.text_field, which.limit)
        name = name_of_texts(file)
        return name, [TextSet.of(name, texts, file=file.name)], []
    dataset = str(which.dataset)
    streamed = DatasetTexts(dataset, which.split, which.dataset_config, which.text_field, which.limit, strict)
    name = Path(dataset).name
    return name, [TextSet(name, streamed, streamed.about, which.limit)], []


def _of_profile(profile: str, category: str | None, most: int | None) -> tuple[str, list[TextSet], list[str]]:
    """The profile's name, a set for each category, and the models that it names."""
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.capture.texts.text_set import TextSet

    loaded = load_profile(profile)
    names = list(loaded.prompts) if category is None else [name.strip() for name in category.split(",")]
    sets = [TextSet.of(name, loaded.category(name)[:most], profile=loaded.name) for name in names]
    return loaded.name, sets, list(loaded.models)


def _finish(units: list[Unit], name: str, root: Path, plan: Plan, mlflow: str | None, log: options.Log) -> None:
    """Write the summary, and log to MLflow; exit with 2 when nothing was captured."""
    from AutomaticEval.report.extraction_page import write_summary

    failed = [unit for unit in units if unit.status == "failed"]
    if len(failed) == len(units):
        raise typer.Exit(2)
    files = write_summary(units, f"Activations of {name}", root)
    rows = [(unit.model, unit.name, unit.status, str(unit.numbers.get("n_samples", ""))) for unit in units]
    print_table("Extracted", ("Model", "Texts", "Status", "Samples"), rows)
    say(f"Summary:     {', '.join(map(str, files))}")
    say(f"Load them:   from AutomaticEval import open_run; run = open_run({str(_first(units).folder)!r})")
    if mlflow is not None:
        _track(units, name, plan, mlflow, files, log)


def _track(units: list[Unit], name: str, plan: Plan, uri: str, files: list[Path], log: options.Log) -> None:
    from dataclasses import asdict

    from AutomaticEval.public_names import public_name
    from AutomaticEval.report.mlflow_run import track

    captured = [unit for unit in units if unit.status == "captured"]
    metrics: dict[str, float | None] = {"failed": len([unit for unit in units if unit.status == "failed"])}
    for number in ("n_samples", "n_tokens", "size_bytes", "seconds", "n_truncated"):
        metrics[number] = sum(unit.numbers[number] for unit in captured)
        metrics |= {f"{Path(unit.model).name}/{unit.name}/{number}": unit.numbers[number] for unit in captured}
    metrics["tokens_per_second"] = (metrics["n_tokens"] or 0) / (metrics["seconds"] or 1e-9)
    params: dict[str, Any] = {
        "texts": name,
        "models": ",".join(dict.fromkeys(public_name(unit.model) for unit in units)),
        **plan.selection.as_dict(),
    }
    params |= {"feeding": asdict(plan.feeding), "load": plan.load.as_dict()}
    say(f"MLflow:      run {track(uri, f'extract {name}', params, metrics, files, log.text)}")


def _first(units: list[Unit]) -> Unit:
    return next(unit for unit in units if unit.status != "failed")

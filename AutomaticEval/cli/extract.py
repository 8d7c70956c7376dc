"""`main.py extract`: the activations of labelled prompts, of a file of texts, or of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors, with_load
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import PromptError, SelectionError

if TYPE_CHECKING:
    from AutomaticEval.capture.texts.many_runs import Plan, TextSet, Unit


@one_line_errors
@with_load
def extract(
    load: options.Load,
    context: typer.Context,
    profile: Annotated[
        str | None, typer.Option("--profile", help="baseline, extended, or a .toml file: labelled prompts, and models.")
    ] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="JSONL, JSON, CSV or txt.")] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="A Hugging Face data set, streamed; or a local folder.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Hub names, folders, or demo, comma-separated. Default: the profile's."),
    ] = None,
    category: Annotated[
        str | None, typer.Option("--category", help="Of the profile, comma-separated. Default: all.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option("--text_field", help="Default: text, input, question or prompt.")
    ] = None,
    dataset_config: Annotated[str | None, typer.Option("--dataset_config")] = None,
    split: Annotated[str, typer.Option("--split", help="Of the data set.")] = "train",
    num_samples: Annotated[int | None, typer.Option("--num_samples", min=1, help="The first so many texts.")] = None,
    seq_length: Annotated[
        int | None, typer.Option("--seq_length", min=1, help="Longer texts are cut. Default: the model's context.")
    ] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Cut nothing; texts share rows, and do not see one another.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse texts that are too long, or empty, and stop at infinite numbers and NaN, once they are stored.",
        ),
    ] = False,
    layers: options.Layers = None,
    sites: Annotated[
        str, typer.Option("--sites", help="Also pattern: attention after softmax.", metavar="SITES")
    ] = "embed,resid_post,mlp_out",
    positions: Annotated[str, typer.Option("--positions", help="all, last, or a slice.")] = "all",
    store_dtype: options.StoreDtype = None,
    compression: options.Compression = None,
    batch_size: Annotated[str, typer.Option("--batch_size", help="Texts a forward, or auto.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", help="Default: below --activation_save_dir, named after the texts.")
    ] = None,
    activation_save_dir: options.SaveDir = Path("activations"),
    mlflow: options.Mlflow = None,
) -> None:
    """Capture texts without generating: each token once, no layer above the deepest that is kept. The same command goes on."""
    if sum(given is not None for given in (profile, texts, dataset)) != 1:
        raise SelectionError("which texts? Give one of --profile, --texts and --dataset.")
    if profile is None and (model is None or category is not None):
        raise SelectionError("--texts and --dataset take a --model, and no --category.")
    if dataset is None:
        options.refuse_unused(context, "it is of a --dataset", "dataset_config", "split")
    if profile is not None:
        options.refuse_unused(context, "the texts of a --profile have no fields", "text_field")
    if output is not None:
        options.refuse_unused(context, "--output says where the activations go", "activation_save_dir")
    if batch_size != "auto" and not batch_size.isdecimal():
        raise PromptError(f"--batch_size is {batch_size!r}; write a number, or auto.")
    options.quiet_libraries()
    from AutomaticEval.capture.texts.batching import Feeding
    from AutomaticEval.capture.texts.many_runs import Plan, TextSet, extract_sets, folder_names
    from AutomaticEval.capture.texts.sources import DatasetTexts, FileTexts
    from AutomaticEval.processes import join_ranks
    from AutomaticEval.report.mlflow_run import require_mlflow
    from AutomaticEval.selection import Selection
    from AutomaticEval.store.hdf5.write import check_compression

    if mlflow is not None:
        require_mlflow()
    check_compression(compression)
    ranks = join_ranks()
    kinds = [kind.strip() for kind in sites.split(",")]
    selection = Selection.parse(
        [kind for kind in kinds if kind != "pattern"] or "resid_post", layers, positions, store_dtype
    )
    many = None if batch_size == "auto" else int(batch_size)
    feeding = Feeding(seq_length, packing, strict, "pattern" in kinds, many)
    plan = Plan(selection, feeding, load(), compression, ranks)
    models = [] if model is None else [name.strip() for name in model.split(",") if name.strip()]
    if profile is not None:
        name, sets, its_models = _of_profile(profile, category, num_samples)
        models = models or its_models
    elif texts is not None:
        name, sets = texts.stem, [TextSet.of(texts.stem, FileTexts(texts, text_field, num_samples), file=texts.name)]
    else:
        streamed = DatasetTexts(str(dataset), split, dataset_config, text_field, num_samples, strict)
        name = Path(str(dataset)).name
        sets = [TextSet(name, streamed, streamed.about, num_samples)]
    if not models:
        raise SelectionError("no model is named; give --model.")
    say = options.Log(speaks=ranks.is_first)
    places, parts = folder_names(models), folder_names([each.name for each in sets])
    of_texts = parts.get(name, name)
    root = output or activation_save_dir / (name if profile is not None else f"{of_texts}_{places[models[0]]}")

    def folder_of(model: str, texts: str) -> Path:
        if profile is not None:
            return root / f"{places[model]}_{parts[texts]}"
        return root / places[model] if len(models) > 1 else root

    units = extract_sets(models, sets, plan, folder_of, say)
    if ranks.is_first:
        _finish(units, name, root, plan, mlflow, say)


def _of_profile(profile: str, category: str | None, most: int | None) -> tuple[str, list[TextSet], list[str]]:
    """Its name, a set a category, and its models."""
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.capture.texts.many_runs import TextSet

    found = load_profile(profile)
    names = list(found.prompts) if category is None else [name.strip() for name in category.split(",")]
    sets = [TextSet.of(name, found.category(name)[:most], profile=found.name) for name in names]
    return found.name, sets, list(found.models)


def _finish(units: list[Unit], name: str, root: Path, plan: Plan, mlflow: str | None, log: options.Log) -> None:
    """Summary, tracking and exit code: 1 when some failed, 2 when nothing was captured."""
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
    if failed:
        raise typer.Exit(1)


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

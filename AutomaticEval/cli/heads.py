"""`main.py heads …`: how strong heads are, and how fine-tuning moved them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import ablate, options, patch, screen, sweep
from AutomaticEval.cli.options import SPELLINGS, one_line_errors, with_load
from AutomaticEval.cli.printing import print_table, say

if TYPE_CHECKING:
    from AutomaticEval.analysis.heads.strength import ActivationExtractor
    from AutomaticEval.models.loading import LoadOptions

app = typer.Typer(
    context_settings=SPELLINGS,
    no_args_is_help=True,
    help="Attention heads: strength, comparison, screening, ablation, patching.",
)
app.command("ablate")(ablate.ablate)
app.command("patch")(patch.patch)
app.command("screen")(screen.screen)
app.command("sweep")(sweep.sweep)
app.command("plot")(screen.plot)

DataPath = Annotated[
    Path, typer.Option("--data_path", help="JSON or JSONL: texts, or objects with input, text or question.")
]
SampleNum = Annotated[int | None, typer.Option("--sample_num", help="So many of the texts, drawn at random.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Texts a forward.")]
Heads = Annotated[str | None, typer.Option("--heads", help="Such as 0-3,7. Default: all.")]
OutputDir = Annotated[Path, typer.Option("--output_dir", help="Where results go; what is there is not overwritten.")]
Of = Annotated[str, typer.Option("--of", help="result: z_h W_O^h, what a head adds; z: the raw slice.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn at random.")]


@app.command()
@one_line_errors
@with_load
def strength(
    load: options.Load,
    data_path: DataPath,
    model: options.Model = "demo",
    sample_num: SampleNum = None,
    batch_size: BatchSize = 8,
    layers: options.Layers = None,
    heads: Heads = None,
    of: Of = "result",
    output_dir: OutputDir = Path("results"),
    seed: Seed = 42,
) -> None:
    """How strong each head is over texts: head_strength.json and head_strength.png."""
    options.quiet_libraries()
    from AutomaticEval.capture.texts.sources import drawn, read_texts
    from AutomaticEval.report.figures import names_of, save_with_figures
    from AutomaticEval.store.disk.json_files import new_results

    file, *_ = new_results(output_dir, "head_strength.json", *names_of("strength"))
    texts = drawn(read_texts(data_path), sample_num, seed)
    extractor = _extracted(model, load(), texts, layers, heads, of, batch_size)
    _say_strongest(extractor.get_all_stats())
    say(f"Written:     {', '.join(map(str, save_with_figures(file, extractor.results())))}")


@app.command()
@one_line_errors
@with_load
def compare(
    load: options.Load,
    context: typer.Context,
    pre_tuned_model: Annotated[str, typer.Option("--pre_tuned_model", help="Before: hub name, folder, or demo.")],
    fine_tuned_model: Annotated[str, typer.Option("--fine_tuned_model", help="After: hub name, folder, or demo.")],
    data_path: DataPath,
    sample_num: SampleNum = 100,
    batch_size: BatchSize = 8,
    output_dir: OutputDir = Path("results"),
    layers: options.Layers = None,
    heads: Heads = None,
    of: Of = "result",
    answers_of: Annotated[
        str | None, typer.Option("--answers_of", help="pre or fine: both read its greedy answers after the texts, too.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Of these answers.")] = 64,
    seed: Seed = 42,
) -> None:
    """How fine-tuning moved each head's strength: the same texts through both models."""
    if answers_of is None:
        options.refuse_unused(context, "it is of --answers_of", "max_new_tokens")
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.compare import ActivationComparator, same_inputs
    from AutomaticEval.capture.texts.sources import drawn, read_texts
    from AutomaticEval.store.disk.json_files import new_results
    from AutomaticEval.store.disk.whole_files import new_files

    names = ("pre_tuned_activations", "fine_tuned_activations", "comparison")
    files = new_results(output_dir, *(f"{name}.json" for name in names), "comparison_heatmap.png")
    texts = drawn(read_texts(data_path), sample_num, seed)
    models = {"pre": pre_tuned_model, "fine": fine_tuned_model}
    inputs = same_inputs(models, texts, load(), answers_of, max_new_tokens, batch_size)
    both = [_extracted(name, load(), inputs, layers, heads, of, batch_size) for name in models.values()]
    comparator = ActivationComparator(*both, seed=seed)
    _say_changes(comparator.compare())
    with new_files(output_dir, "comparison") as made:
        before, after, comparison, heatmap = (made / file.name for file in files)
        both[0].save_results(before)
        both[1].save_results(after)
        comparator.save_comparison(comparison)
        comparator.visualize_comparison(heatmap)
    say(f"Written:     {', '.join(map(str, files))}")


def _extracted(
    model: str, load: LoadOptions, inputs: Any, layers: str | None, heads: str | None, of: str, batch_size: int
) -> ActivationExtractor:
    from AutomaticEval.analysis.heads.strength import ActivationExtractor
    from AutomaticEval.models.loading import load_model

    say(f"Loading {model} …", err=True)
    extractor = ActivationExtractor(load_model(model, options=load), of=of)
    extractor.register_hooks(layers, heads)
    extractor.extract_activations(inputs, batch_size=batch_size, progress=True)
    return extractor


def _say_strongest(stats: dict[tuple[int, int], dict[str, float]], most: int = 10) -> None:
    strongest = sorted(stats.items(), key=lambda item: -item[1]["R_h"])[:most]
    rows = [(str(layer), str(head), f"{each['R_h']:.4g}", f"{each['std']:.3g}") for (layer, head), each in strongest]
    print_table(f"The strongest of {len(stats)} heads", ("Layer", "Head", "R_h", "std"), rows)


def _say_changes(found: dict[str, Any], most: int = 10) -> None:
    rows = []
    for key, change in sorted(found["differences"].items(), key=lambda item: -abs(item[1]))[:most]:
        numbers = (found["pre_tuned"][key], found["fine_tuned"][key], change, found["ratios"][key])
        rows.append((str(key[0]), str(key[1]), *(f"{number:.4g}" for number in numbers)))
    columns = ("Layer", "Head", "Before", "After", "Change", "Ratio")
    print_table("The heads that changed most", columns, rows)
    correlation = found["rank_correlation"]
    if correlation["rho"] is None:
        say("Rank correlation of the strength before with the change: none, since one of them is all one number")
        return
    low, high = correlation["interval"]
    say(
        f"Rank correlation of the strength before with the change: {correlation['rho']:.3f} (95 % interval over heads {low:.3f} to "
        f"{high:.3f})"
    )

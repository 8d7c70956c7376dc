"""`main.py heads …`: how strong heads are, and how fine-tuning changed that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import ablate, options, patch, plot, screen, sweep
from AutomaticEval.cli.finish import Table, finish, result_file, say_written
from AutomaticEval.cli.interventions import Prompts
from AutomaticEval.cli.options import MODEL, RUN, SPELLINGS, command, options_of, refuse_unused, takes
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.options import Option

if TYPE_CHECKING:
    from AutomaticEval.analysis.heads.strength import ActivationExtractor
    from AutomaticEval.analysis.made_with import TextsRead

app = typer.Typer(
    context_settings=SPELLINGS,
    no_args_is_help=True,
    help="Attention heads: strength, comparison, screening, ablation, patching.",
)
app.command("ablate")(ablate.ablate)
app.command("patch")(patch.patch)
app.command("screen")(screen.screen)
app.command("sweep")(sweep.sweep)
app.command("plot")(plot.plot)


@dataclass(frozen=True)
class Strength:
    """Which heads are measured, and how."""

    layers: Annotated[str | None, Option("Layers, such as 0-2,-1. Default: all.", metavar="LAYERS")] = None
    heads: Annotated[str | None, Option("Heads, such as 0-3,7. Default: all.")] = None
    of: Annotated[str, Option("result: z_h W_O^h, what a head adds; z: the raw slice.")] = "result"
    batch_size: Annotated[int, Option("Texts in a forward.", minimum=1)] = 8

    def measured(self, model: str, load: LoadOptions, inputs: Any) -> ActivationExtractor:
        """The strength of a model's heads over texts."""
        from AutomaticEval.analysis.heads.strength import ActivationExtractor
        from AutomaticEval.models.loading import load_model

        say(f"Loading {model} …", err=True)
        extractor = ActivationExtractor(load_model(model, options=load), of=self.of)
        extractor.register_hooks(self.layers, self.heads)
        extractor.extract_activations(inputs, batch_size=self.batch_size, progress=True)
        return extractor

    def settings(
        self, extractor: ActivationExtractor, drawing: Prompts, read: TextsRead, **more: Any
    ) -> dict[str, Any]:
        """What files say of how a strength was measured. more: further options."""
        from AutomaticEval.analysis.made_with import AnalysisSettings

        read = replace(read, n_truncated=extractor.n_truncated)
        told = {"of": self.of, "layers": self.layers, "heads": self.heads, "num_trials": drawing.num_trials, **more}
        of_model = AnalysisSettings.of(
            extractor.loaded, {"texts": read}, batch_size=self.batch_size, seed=drawing.seed, options=told
        )
        return of_model.as_dict()


@app.command()
@command
@takes(how=Strength, drawing=options_of(Prompts, "num_trials", "seed"), load=LoadOptions)
def strength(
    how: Strength,
    drawing: Prompts,
    load: LoadOptions,
    texts: options.Texts,
    model: options.Model = "demo",
    output: options.Results = Path("results"),
) -> None:
    """Measure how strong each head is over texts: head_strength.json and head_strength.png."""
    options.quiet_libraries()
    from AutomaticEval.analysis.made_with import TextsRead
    from AutomaticEval.capture.texts.sources import read_texts

    file = result_file(output, "head_strength.json", "strength")
    asked = drawing.drawn(read_texts(texts))
    extractor = how.measured(model, load, asked)
    extractor.settings = how.settings(extractor, drawing, TextsRead.of(asked, texts))
    finish(file, extractor.result(), _strongest(extractor.get_all_stats()))


@app.command()
@command
@takes(how=Strength, drawing=options_of(Prompts, "num_trials", "seed", num_trials=100), load=LoadOptions)
def compare(
    context: typer.Context,
    how: Strength,
    drawing: Prompts,
    load: LoadOptions,
    pre_tuned_model: Annotated[
        str,
        typer.Option("--pre_tuned_model", help="Model before: hub name, folder, or demo.", rich_help_panel=MODEL),
    ],
    fine_tuned_model: Annotated[
        str,
        typer.Option("--fine_tuned_model", help="Model after: hub name, folder, or demo.", rich_help_panel=MODEL),
    ],
    texts: options.Texts,
    answers_of: Annotated[
        str | None,
        typer.Option(
            "--answers_of",
            help="pre or fine: both read its greedy answers after the texts, too.",
            rich_help_panel=RUN,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", help="The most tokens of these answers.", rich_help_panel=RUN)
    ] = 64,
    output: options.Results = Path("results"),
) -> None:
    """Measure how fine-tuning changed the strength of each head: both models read the same texts."""
    if answers_of is None:
        refuse_unused(context, "it is of --answers_of", "max_new_tokens")
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.compare import ActivationComparator, same_inputs
    from AutomaticEval.analysis.made_with import TextsRead
    from AutomaticEval.capture.texts.sources import read_texts
    from AutomaticEval.store.disk.json_files import new_results
    from AutomaticEval.store.disk.whole_files import new_files

    names = ("pre_tuned_activations", "fine_tuned_activations", "comparison")
    files = new_results(output, *(f"{name}.json" for name in names), "comparison_heatmap.png")
    models = {"pre": pre_tuned_model, "fine": fine_tuned_model}
    asked = drawing.drawn(read_texts(texts))
    inputs = same_inputs(models, asked, load, answers_of, max_new_tokens, how.batch_size)
    both = [how.measured(name, load, inputs) for name in models.values()]
    for each in both:
        answers = {"answers_of": answers_of, "max_new_tokens": None if answers_of is None else max_new_tokens}
        each.settings = how.settings(each, drawing, TextsRead.of(asked, texts), **answers)
    comparator = ActivationComparator(*both)
    _say_changes(comparator.compare())
    with new_files(output, "comparison") as made:
        before, after, comparison, heatmap = (made / file.name for file in files)
        both[0].save_results(before)
        both[1].save_results(after)
        comparator.save_comparison(comparison)
        comparator.visualize_comparison(heatmap)
    say_written(*files)


def _strongest(stats: dict[tuple[int, int], dict[str, float]], most: int = 10) -> Table:
    strongest = sorted(stats.items(), key=lambda item: -item[1]["R_h"])[:most]
    rows = [(str(layer), str(head), f"{each['R_h']:.4g}", f"{each['std']:.3g}") for (layer, head), each in strongest]
    return Table(f"The strongest of {len(stats)} heads", ("Layer", "Head", "R_h", "std"), rows)


def _say_changes(comparison: dict[str, Any], most: int = 10) -> None:
    rows = []
    for key, change in sorted(comparison["differences"].items(), key=lambda item: -abs(item[1]))[:most]:
        numbers = (comparison["pre_tuned"][key], comparison["fine_tuned"][key], change, comparison["ratios"][key])
        rows.append((str(key[0]), str(key[1]), *(f"{number:.4g}" for number in numbers)))
    columns = ("Layer", "Head", "Before", "After", "Change", "Ratio")
    print_table("The heads that changed most", columns, rows)
    correlation = comparison["rank_correlation"]
    name = "Rank correlation of the strength before with the change"
    if correlation["rho"] is None:
        say(f"{name}: none, since one of them is all one number")
        return
    how_sure = f"no interval: {correlation['reason']}"
    if correlation["interval"] is not None:
        low, high = correlation["interval"]
        how_sure = f"95 % interval over {correlation['interval_over']} {low:.3f} to {high:.3f}"
    within = correlation["within_layers"]["mean"]
    say(f"{name}: {correlation['rho']:.3f} ({how_sure})" + ("" if within is None else f"; within layers {within:.3f}"))

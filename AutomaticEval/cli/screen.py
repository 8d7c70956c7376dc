"""`main.py heads screen`: which heads react to categories of prompts; `heads plot`: figures of result files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.interventions import BatchSize, SampleNum, Seed, number
from AutomaticEval.cli.options import one_line_errors, with_load
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import SelectionError

if TYPE_CHECKING:
    from AutomaticEval.analysis.heads.screen import HeadScore
    from AutomaticEval.analysis.words.profiles import Profile
    from AutomaticEval.analysis.words.targets import Target
    from AutomaticEval.models.loading import LoadedModel


@one_line_errors
@with_load
def screen(
    load: options.Load,
    model: options.Model = "demo",
    profile: Annotated[str, typer.Option("--profile", help="baseline, extended, or a .toml file.")] = "baseline",
    output: Annotated[
        Path, typer.Option("--output", help="A .json file, or a folder for scores.json; figures go beside it.")
    ] = Path("results"),
    target: Annotated[
        str | None, typer.Option("--target", help='A token, such as " thanks", in place of the category\'s keywords.')
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="Another, whose logit is taken off.")] = None,
    permutations: Annotated[int, typer.Option("--permutations", min=1, help="For p.")] = 2000,
    sample_num: SampleNum = None,
    batch_size: BatchSize = 8,
    seed: Seed = 42,
) -> None:
    """Three scores of every head for every category: strength, attention to keywords, direct effect on logits."""
    if (target is None) != (against is None):
        raise SelectionError("a logit difference takes two tokens: give --target and --against.")
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.screen import screen
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.capture.texts.sources import drawn
    from AutomaticEval.capture.vocabulary import token_strings
    from AutomaticEval.models.loading import load_model
    from AutomaticEval.report.figures import names_of, save_with_figures
    from AutomaticEval.store.disk.json_files import new_results

    file = output if output.suffix == ".json" else output / "scores.json"
    new_results(file.parent, file.name, *names_of("screening"))
    found = load_profile(profile)
    prompts = {category: drawn(texts, sample_num, seed) for category, texts in found.prompts.items()}
    loaded = load_model(model, options=load())
    targets = _targets(loaded, prompts, found, target, against)
    drawn_profile = replace(found, prompts=prompts)
    result = screen(loaded, drawn_profile, targets, n_permutations=permutations, seed=seed, batch_size=batch_size)
    settings: dict[str, Any] = {"model": loaded.name, **loaded.made_with(), "dtype": str(loaded.model.dtype)}
    settings |= {"profile": profile, "permutations": permutations, "seed": seed, "keywords": found.keywords}
    settings["prompts"] = {category: len(texts) for category, texts in prompts.items()}
    settings["targets"] = {
        category: {name: token_strings(loaded.tokenizer, ids) for name, ids in each._asdict().items()}
        for category, each in targets.items()
    }
    _say(result.measured["scores"])
    written = save_with_figures(file, replace(result, settings=settings).as_json())
    say(f"Written:     {', '.join(map(str, written))}")


def _targets(
    loaded: LoadedModel, prompts: dict[str, list[str]], profile: Profile, target: str | None, against: str | None
) -> dict[str, Target]:
    """For each category the tokens whose logits are compared: --target and --against, or the category's keywords."""
    from AutomaticEval.analysis.words.targets import Target, check_target, one_token, targets_of

    if target is None or against is None:
        return targets_of(loaded.tokenizer, {n: w for n, w in profile.keywords.items() if n != profile.neutral})
    both = Target([one_token(loaded.tokenizer, target)], [one_token(loaded.tokenizer, against)])
    check_target(both, loaded.model.config.get_text_config().vocab_size)
    return dict.fromkeys((category for category in prompts if category != profile.neutral), both)


def _say(scores: list[HeadScore], most: int = 10) -> None:
    rows = []
    known = [each for each in scores if not math.isnan(each.strength.d)]
    for each in sorted(known, key=lambda each: -abs(each.strength.d))[:most]:
        strength = each.strength
        numbers = (f"{strength.d:.2f}", f"{strength.p:.3g}", number(each.attention), number(each.direct))
        rows.append((f"{each.layer}:{each.head}", each.category, *numbers))
    columns = ("Head", "Category", "Strength: d", "p", "Attention above uniform", "Direct effect, logits")
    print_table(f"The largest changes of strength, of {len(scores)} scores", columns, rows)


@one_line_errors
def plot(
    files: Annotated[list[Path], typer.Argument(help="Result files: scores.json, sweep.json, ablation.json, …")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for the figures. Default: beside each file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace figures that are there.")] = False,
) -> None:
    """Draw result files again: head_reaction_heatmap.png, top_heads.png, comparison_heatmap.png, …"""
    from AutomaticEval.report.figures import check_figures, draw
    from AutomaticEval.store.disk.json_files import read_json

    found = [(read_json(file), output or file.parent) for file in files]
    check_figures(found, overwrite=overwrite)  # all, before the first is drawn
    for result, folder in found:
        for figure in draw(result, folder, overwrite=overwrite):
            say(f"Written:     {figure}")

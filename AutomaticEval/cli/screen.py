"""`main.py heads screen`: which heads react to categories of prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.interventions import Prompts, number, tell_of_unreachable
from AutomaticEval.cli.options import OUTPUT, RUN, command, options_of, takes
from AutomaticEval.cli.printing import say
from AutomaticEval.errors import SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.public_names import public_name

if TYPE_CHECKING:
    from AutomaticEval.analysis.heads.screen import HeadScore
    from AutomaticEval.analysis.words.profiles import Profile
    from AutomaticEval.analysis.words.targets import Target
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel


TargetToken = Annotated[
    str | None,
    typer.Option(
        "--target", help='A token, such as " thanks", in place of the category\'s keywords.', rich_help_panel=RUN
    ),
]
AgainstToken = Annotated[
    str | None, typer.Option("--against", help="Another token, whose logit is taken off.", rich_help_panel=RUN)
]
Permutations = Annotated[
    int, typer.Option("--permutations", min=1, help="Permutations of the labels, for p.", rich_help_panel=RUN)
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="A .json file, or a folder for scores.json; figures go beside it.",
        rich_help_panel=OUTPUT,
    ),
]


@command
@takes(prompts=options_of(Prompts, "profile", "num_trials", "seed", profile="baseline"), load=LoadOptions)
def screen(
    prompts: Prompts,
    load: LoadOptions,
    model: options.Model = "demo",
    target: TargetToken = None,
    against: AgainstToken = None,
    permutations: Permutations = 2000,
    batch_size: options.BatchSize = 8,
    output: Output = Path("results"),
) -> None:
    """Score every head for every category of prompts: strength, attention to keywords, direct effect on logits."""
    if (target is None) != (against is None):
        raise SelectionError("a logit difference takes two tokens: give --target and --against.")
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.screen import screen
    from AutomaticEval.analysis.made_with import AnalysisSettings, TextsRead
    from AutomaticEval.analysis.numbers.permutation import least_p
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.models.loading import load_model

    file = output if output.suffix == ".json" else output / "scores.json"
    result_file(file.parent, file.name, "screening")
    profile = load_profile(str(prompts.profile))
    texts = {category: prompts.drawn(asked) for category, asked in profile.prompts.items()}
    for category, asked in texts.items():
        if category != profile.neutral:
            tell_of_unreachable(
                f"{len(asked)} prompts of {category} against {len(texts[profile.neutral])}",
                least_p(len(asked), len(texts[profile.neutral]), permutations),
            )
    loaded = load_model(model, options=load)
    targets = _targets(loaded, texts, profile, target, against)
    drawn_profile = replace(profile, prompts=texts)
    result = screen(
        loaded, drawn_profile, targets, n_permutations=permutations, seed=prompts.seed, batch_size=batch_size
    )
    settings = AnalysisSettings.of(
        loaded,
        TextsRead.of_profile(texts, str(prompts.profile)),
        batch_size=batch_size,
        seed=prompts.seed,
        options={
            "profile": public_name(str(prompts.profile)),
            "permutations": permutations,
            "num_trials": prompts.num_trials,
            "keywords": profile.keywords,
            "prompts": {category: len(asked) for category, asked in texts.items()},
            "targets": _tokens_of(loaded, targets),
            "attention_while_measured": "eager",  # patterns exist with eager attention alone
        },
    )
    finish(file, replace(result, settings=settings.as_dict()), _largest(result.measured["scores"]))
    for category, length in result.measured["lengths"].items():
        if length.p < 0.05:
            say(
                f"The prompts of {category} are of {length.mean:.3g} tokens, the neutral ones of {length.neutral:.3g} (p {length.p:.2g}). "
                f"Strength is compared at the first {length.n_positions} positions, which both have; the direct effect is not."
            )


def _tokens_of(loaded: LoadedModel, targets: dict[str, Target]) -> dict[str, dict[str, list[str]]]:
    """For each category, the tokens whose logits are compared."""
    from AutomaticEval.capture.vocabulary import token_strings

    return {
        category: {name: token_strings(loaded.tokenizer, ids) for name, ids in each._asdict().items()}
        for category, each in targets.items()
    }


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


def _largest(scores: list[HeadScore], most: int = 10) -> Table:
    rows = []
    known = [each for each in scores if not math.isnan(each.strength.d)]
    for each in sorted(known, key=lambda each: -abs(each.strength.d))[:most]:
        strength = each.strength
        numbers = (
            f"{strength.d:.2f}",
            f"{strength.p:.3g}",
            number(each.attention),
            number(each.direct),
            _p(each.direct.p),
        )
        rows.append((f"{each.layer}:{each.head}", each.category, *numbers))
    columns = ("Head", "Category", "Strength: d", "p", "Attention above placebo", "Direct effect, logits", "p")
    return Table(f"The largest changes of strength, of {len(scores)} scores", columns, rows)


def _p(chance: float | None) -> str:
    return "none" if chance is None else f"{chance:.3g}"

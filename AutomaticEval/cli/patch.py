"""`main.py heads patch`: how much of an answer comes with the values of some heads or layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.cli import options
from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.interventions import (
    Pairs,
    Prompts,
    Sentiment,
    SiteOption,
    answers_table,
    metrics_of,
    number,
    tell_of_few,
)
from AutomaticEval.cli.options import RUN, command, options_of, refuse_unused, takes
from AutomaticEval.errors import EditError, SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions

Places = Annotated[
    str,
    typer.Option(
        "--head_spec", help="layer:head, such as 0:0,3:5 or 3:*; for other sites than z a layer.", rich_help_panel=RUN
    ),
]


@command
@takes(
    prompts=Prompts,
    sampling=options_of(Sampling, "max_new_tokens", "temperature", "seed", max_new_tokens=15),
    load=LoadOptions,
)
def patch(
    context: typer.Context,
    prompts: Prompts,
    sampling: Sampling,
    load: LoadOptions,
    head_spec: Places,
    model: options.Model = "demo",
    pairs: Pairs = None,
    positions: Annotated[
        str,
        typer.Option("--positions", help="last, all (prompts of equal length) or aligned.", rich_help_panel=RUN),
    ] = "last",
    site: SiteOption = "z",
    sentiment: Sentiment = "vader",
    batch_size: options.BatchSize = 8,
    output: options.Results = Path("results"),
) -> None:
    """Put values from the prompts of a category into neutral runs, or from clean into corrupted runs and back."""
    if (pairs is None) == (prompts.profile is None) or (prompts.profile is None) != (prompts.category is None):
        raise SelectionError("give --profile with --category, or --pairs.")
    if pairs is not None:
        of_answers = ("max_new_tokens", "temperature", "sentiment", "batch_size")
        refuse_unused(context, "it is of a --profile: of --pairs nothing is answered", *of_answers)
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.patch import Patching, recovered
    from AutomaticEval.analysis.made_with import AnalysisSettings, TextsRead
    from AutomaticEval.analysis.parts.before_after import answers_with
    from AutomaticEval.analysis.words.pairs import read_pairs
    from AutomaticEval.models.loading import load_model

    kind = "patching" if pairs is None else "pairs"
    file = result_file(output, "patching.json", kind)
    asked = [] if pairs is None else prompts.drawn(read_pairs(pairs))
    profile = prompts.load_profile()
    sources = [] if profile is None else profile.category(str(prompts.category))
    neutral = [] if profile is None else profile.category(profile.neutral)
    both = prompts.drawn(list(zip(sources, neutral, strict=False)))
    tell_of_few(len(asked) or len(both), "pairs" if asked else "prompts")
    loaded = load_model(model, options=load)
    places = _places(head_spec, site, loaded.layout.n_layers, loaded.layout.n_heads)
    read = {"pairs": TextsRead.of([vars(pair) for pair in asked], str(pairs))}
    if profile is not None:
        sources, destinations = map(list, zip(*both, strict=True))
        category = str(prompts.category)
        read = TextsRead.of_profile({category: sources, profile.neutral: destinations}, str(prompts.profile))
    settings = AnalysisSettings.of(
        loaded,
        read,
        batch_size=None if profile is None else batch_size,
        seed=prompts.seed,
        options={"places": head_spec, "site": site, "positions": positions, **prompts.asked_as(sampling, sentiment)},
    ).as_dict()
    if profile is None:
        result = replace(recovered(loaded, asked, places, positions, site, seed=prompts.seed), settings=settings)
        rows = [(name, number(each)) for name, each in result.measured["summary"].items()]
        finish(file, result, Table("Logit difference recovered", ("", "Part (95 % interval)"), rows))
        return
    patching = Patching(loaded, sources, destinations, places, positions, site)
    metrics = metrics_of(sentiment, prompts.keywords(profile))
    result = answers_with(patching, destinations, metrics, sampling, batch_size=batch_size)
    finish(file, replace(result, settings=settings), answers_table(result))


def _places(spec: str, site: str, n_layers: int, n_heads: int) -> dict[int, list[int] | None]:
    from AutomaticEval.analysis.heads.ablate import parse_head_spec
    from AutomaticEval.sites import expand

    if site == "z":
        return dict(parse_head_spec(spec, n_layers, n_heads))
    if ":" in spec:
        raise EditError(f"{site} has no heads; write layers, such as 3 or 0-2.")
    return {int(each.layer or 0): None for each in expand(["z"], spec, n_layers)}

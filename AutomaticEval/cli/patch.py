"""`main.py heads patch`: what of a run's answer comes with its values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.interventions import (
    BatchSize,
    Emotion,
    MaxTokens,
    Output,
    Pairs,
    Profiles,
    SampleNum,
    Seed,
    Sentiment,
    SiteOption,
    Temperature,
    answered,
    metrics_of,
    number,
)
from AutomaticEval.cli.options import one_line_errors, with_load
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import EditError, SelectionError


@one_line_errors
@with_load
def patch(
    load: options.Load,
    context: typer.Context,
    head_spec: Annotated[
        str, typer.Option("--head-spec", help="layer:head, such as 0:0,3:5 or 3:*; a layer for other sites.")
    ],
    model: options.Model = "demo",
    profile: Profiles = None,
    emotion: Emotion = None,
    pairs: Pairs = None,
    positions: Annotated[
        str, typer.Option("--positions", help="last, all (prompts of equal length) or aligned.")
    ] = "last",
    site: SiteOption = "z",
    output: Output = Path("results"),
    sample_num: SampleNum = None,
    max_tokens: MaxTokens = 15,
    temperature: Temperature = 0.0,
    sentiment: Sentiment = "vader",
    batch_size: BatchSize = 8,
    seed: Seed = 42,
) -> None:
    """Put values of emotion prompts into neutral runs, or of clean into corrupted runs and back."""
    if (pairs is None) == (profile is None) or (profile is None) != (emotion is None):
        raise SelectionError("give --profile with --emotion, or --pairs.")
    if pairs is not None:
        of_answers = ("max_tokens", "temperature", "sentiment", "batch_size")
        options.refuse_unused(context, "it is of a --profile: of --pairs nothing is answered", *of_answers)
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.patch import Patching, recovered
    from AutomaticEval.analysis.words.pairs import read_pairs
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.capture.generation import Sampling
    from AutomaticEval.capture.texts.sources import drawn
    from AutomaticEval.models.loading import load_model
    from AutomaticEval.report.figures import names_of, save_with_figures
    from AutomaticEval.store.disk.json_files import new_results

    kind = "patching" if pairs is None else "pairs"
    file, *_ = new_results(output, "patching.json", *names_of(kind))
    asked = [] if pairs is None else drawn(read_pairs(pairs), sample_num, seed)
    found = None if profile is None else load_profile(profile)
    sources = [] if found is None else found.category(str(emotion))
    loaded = load_model(model, options=load())
    places = _places(head_spec, site, loaded.layout.n_layers, loaded.layout.n_heads)
    settings: dict[str, Any] = {
        "model": loaded.name,
        "places": head_spec,
        "site": site,
        "positions": positions,
        "profile": profile,
    }
    settings |= {"emotion": emotion, "temperature": temperature, "seed": seed}
    results: dict[str, Any] = {"kind": kind, "settings": settings}
    if found is None:
        result = recovered(loaded, asked, places, positions, site)
        results |= result.as_json()
        rows = [(name, number(each)) for name, each in result.measured["summary"].items()]
        print_table("Logit difference recovered", ("", "Part (95 % interval)"), rows)
    else:
        both = drawn(list(zip(sources, found.category(found.neutral), strict=False)), sample_num, seed)
        sources, destinations = map(list, zip(*both, strict=True))
        patching = Patching(loaded, sources, destinations, places, positions, site)
        sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, seed=seed)
        metrics = metrics_of(sentiment, found.keywords.get(str(emotion)))
        results |= answered(patching, destinations, sampling, metrics, batch_size)
    say(f"Written:     {', '.join(map(str, save_with_figures(file, results)))}")


def _places(spec: str, site: str, n_layers: int, n_heads: int) -> dict[int, list[int] | None]:
    from AutomaticEval.analysis.heads.ablate import parse_head_spec
    from AutomaticEval.sites import expand

    if site == "z":
        return dict(parse_head_spec(spec, n_layers, n_heads))
    if ":" in spec:
        raise EditError(f"{site} has no heads; write layers, such as 3 or 0-2.")
    return {int(each.layer or 0): None for each in expand(["z"], spec, n_layers)}

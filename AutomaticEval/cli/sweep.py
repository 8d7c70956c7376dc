"""`main.py heads sweep`: every head, or every position of another site, changed by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.interventions import Emotion, Output, Pairs, Profiles, Seed, SiteOption, number
from AutomaticEval.cli.options import one_line_errors, with_load
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import SelectionError

if TYPE_CHECKING:
    from AutomaticEval.analysis.result import Result


@one_line_errors
@with_load
def sweep(
    load: options.Load,
    model: options.Model = "demo",
    profile: Profiles = None,
    emotion: Emotion = None,
    pairs: Pairs = None,
    site: SiteOption = "z",
    mode: Annotated[
        str | None, typer.Option("--mode", help="zero (default), or mean (over the profile's neutral prompts).")
    ] = None,
    output: Output = Path("results"),
    sample_num: Annotated[
        int | None, typer.Option("--sample_num", help="So many prompts (default: 16) or pairs (all), drawn at random.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Of each answer; default: 15.")] = None,
    seed: Seed = 42,
) -> None:
    """Ablate each head over prompts of a profile, or patch each between pairs. A sweep that was cut short goes on."""
    if (pairs is None) == (emotion is None) or (pairs is not None and profile is not None):
        raise SelectionError("give --emotion, a category of the --profile, to ablate; or --pairs, to patch.")
    if pairs is not None and (mode, max_tokens) != (None, None):
        raise SelectionError("--mode and --max-tokens are of --emotion: pairs are patched, and nothing is answered.")
    mode, max_tokens = mode or "zero", max_tokens or 15
    if mode not in ("zero", "mean"):
        raise SelectionError(f"--mode is {mode!r}; write zero or mean.")
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
    from AutomaticEval.analysis.heads.sweep_results import sweep_pairs, sweep_prompts
    from AutomaticEval.analysis.words.pairs import read_pairs
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.capture.texts.sources import drawn
    from AutomaticEval.models.loading import load_model
    from AutomaticEval.report.figures import names_of, save_with_figures
    from AutomaticEval.store.disk.json_files import new_results

    file, *_ = new_results(output, "sweep.json", *names_of("sweep"))
    asked = [] if pairs is None else drawn(read_pairs(pairs), sample_num, seed)
    profile = profile or "baseline"
    found = load_profile(profile)
    prompts = [] if emotion is None else drawn(found.category(emotion), sample_num or 16, seed)
    neutral = found.category(found.neutral) if mode == "mean" else None
    loaded = load_model(model, options=load())
    settings: dict[str, Any] = {"model": loaded.name, **loaded.made_with(), "dtype": str(loaded.model.dtype)}
    settings["site"] = site
    if pairs is not None:
        settings["pairs"] = [vars(pair) for pair in asked]
        result = sweep_pairs(loaded, asked, SweepFolder(output / "sweep", settings), site=site)
    else:
        settings |= {"profile": profile, "emotion": emotion, "mode": mode, "max_tokens": max_tokens, "prompts": prompts}
        how: dict[str, Any] = {"site": site, "neutral": neutral, "max_new_tokens": max_tokens}
        result = sweep_prompts(loaded, prompts, SweepFolder(output / "sweep", settings), **how)
    _say(result)
    say(f"Written:     {', '.join(map(str, save_with_figures(file, result.as_json())))}")


def _say(result: Result, most: int = 10) -> None:
    places, units = result.measured["places"], result.measured["units"]
    across = "head" if "head" in places[0] else "position"
    names = list(units)
    known = [each for each in places if each[names[0]].mean is not None]
    strongest = sorted(known, key=lambda each: -abs(each[names[0]].mean))[:most]
    rows = [(f"{each['layer']}:{each[across]}", *(number(each[name]) for name in names)) for each in strongest]
    columns = [f"{name}, {unit} (95 % interval)" for name, unit in units.items()]
    n_samples = len(result.measured["samples"])
    print_table(f"What matters most, over {n_samples} prompts or pairs", (f"Layer:{across}", *columns), rows)

"""`main.py heads sweep`: every head, or every position of another site, changed by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.interventions import Pairs, Prompts, SiteOption, number, tell_of_few
from AutomaticEval.cli.options import RUN, command, takes
from AutomaticEval.errors import SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.public_names import public_name

if TYPE_CHECKING:
    from AutomaticEval.analysis.made_with import TextsRead
    from AutomaticEval.analysis.result import Result
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

N_PROMPTS = 16
"""How many prompts of a category are asked when --num_trials is not given."""
MAX_NEW_TOKENS = 15

Mode = Annotated[
    str | None,
    typer.Option("--mode", help="zero (default), or mean (over the profile's neutral prompts).", rich_help_panel=RUN),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max_new_tokens", help=f"Of each answer; default: {MAX_NEW_TOKENS}.", rich_help_panel=RUN),
]


@command
@takes(prompts=Prompts, load=LoadOptions)
def sweep(
    prompts: Prompts,
    load: LoadOptions,
    model: options.Model = "demo",
    pairs: Pairs = None,
    site: SiteOption = "z",
    mode: Mode = None,
    max_new_tokens: MaxNewTokens = None,
    output: options.Results = Path("results"),
) -> None:
    """Ablate each head over prompts of a profile, or patch each head between pairs.

    16 prompts of a profile are asked, or as many as --num_trials says. The same command, given again, goes on with a sweep that was cut short.
    """
    if (pairs is None) == (prompts.category is None) or (pairs is not None and prompts.profile is not None):
        raise SelectionError("give --category, a category of the --profile, to ablate; or --pairs, to patch.")
    if pairs is not None and (mode, max_new_tokens) != (None, None):
        raise SelectionError(
            "--mode and --max_new_tokens are of --category: pairs are patched, and nothing is answered."
        )
    if mode not in (None, "zero", "mean"):
        raise SelectionError(f"--mode is {mode!r}; write zero or mean.")
    options.quiet_libraries()
    file = result_file(output, "sweep.json", "sweep", output / "sweep")
    if pairs is not None:
        result = _over_pairs(prompts, model, load, pairs, site, output / "sweep")
    else:
        result = _over_prompts(
            prompts, model, load, site, output / "sweep", mode or "zero", max_new_tokens or MAX_NEW_TOKENS
        )
    finish(file, result, _strongest(result))


def _over_pairs(prompts: Prompts, model: str, load: LoadOptions, pairs: Path, site: str, folder: Path) -> Result:
    """How much of the logit difference comes back when one value of the clean run is put into the corrupted run."""
    from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
    from AutomaticEval.analysis.heads.sweep_results import sweep_pairs
    from AutomaticEval.analysis.made_with import TextsRead
    from AutomaticEval.analysis.words.pairs import read_pairs
    from AutomaticEval.models.loading import load_model

    asked = prompts.drawn(read_pairs(pairs))
    tell_of_few(len(asked), "pairs")
    loaded = load_model(model, options=load)
    settings = _settings(loaded, site) | {"pairs": [vars(pair) for pair in asked]}
    result = sweep_pairs(loaded, asked, SweepFolder(folder, settings), site=site, seed=prompts.seed)
    read = {"pairs": TextsRead.of(settings["pairs"], pairs)}
    return replace(result, settings=_told(loaded, read, prompts, settings))


def _over_prompts(
    prompts: Prompts, model: str, load: LoadOptions, site: str, folder: Path, mode: str, max_new_tokens: int
) -> Result:
    """How the answers to a category's prompts change when one head is taken out."""
    from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
    from AutomaticEval.analysis.heads.sweep_results import sweep_prompts
    from AutomaticEval.analysis.made_with import TextsRead, n_longer
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.models.loading import load_model

    chosen = replace(prompts, profile=prompts.profile or "baseline", num_trials=prompts.num_trials or N_PROMPTS)
    profile = load_profile(str(chosen.profile))
    asked = chosen.drawn(profile.category(str(chosen.category)))
    tell_of_few(len(asked), "prompts")
    neutral = profile.category(profile.neutral) if mode == "mean" else None
    loaded = load_model(model, options=load)
    settings = _settings(loaded, site) | {
        "profile": public_name(str(chosen.profile)),
        "emotion": chosen.category,
        "mode": mode,
        "max_tokens": max_new_tokens,
        "prompts": asked,
    }
    place = SweepFolder(folder, settings)
    asked_as: dict[str, Any] = {
        "site": site,
        "neutral": neutral,
        "max_new_tokens": max_new_tokens,
        "seed": prompts.seed,
    }
    result = sweep_prompts(loaded, asked, place, **asked_as)
    name = public_name(str(chosen.profile))
    read = {"prompts": TextsRead.of(asked, f"{name}, {chosen.category}")}
    if neutral is not None:
        read["reference"] = TextsRead.of(neutral, f"{name}, {profile.neutral}", n_longer(loaded, neutral))
    return replace(result, settings=_told(loaded, read, chosen, settings))


def _told(
    loaded: LoadedModel, read: dict[str, TextsRead], prompts: Prompts, settings: dict[str, Any]
) -> dict[str, Any]:
    """What the result file says: the settings that a sweep which goes on must share, and the others."""
    from AutomaticEval.analysis.heads.sweep_results import SWEPT_TOGETHER
    from AutomaticEval.analysis.made_with import AnalysisSettings

    options = {**settings, "num_trials": prompts.num_trials}
    made = AnalysisSettings.of(loaded, read, batch_size=SWEPT_TOGETHER, seed=prompts.seed, options=options)
    return made.as_dict()


def _settings(loaded: LoadedModel, site: str) -> dict[str, Any]:
    return {"model": loaded.name, **loaded.made_with().as_dict(), "dtype": str(loaded.model.dtype), "site": site}


def _strongest(result: Result, most: int = 10) -> Table:
    places, units = result.measured["places"], result.measured["units"]
    across = "head" if "head" in places[0] else "position"
    names = list(units)
    known = [each for each in places if each[names[0]].mean is not None]
    strongest = sorted(known, key=lambda each: -abs(each[names[0]].mean))[:most]
    rows = [(f"{each['layer']}:{each[across]}", *(number(each[name]) for name in names)) for each in strongest]
    columns = [f"{name}, {unit} (95 % interval)" for name, unit in units.items()]
    n_samples = len(result.measured["samples"])
    return Table(f"What matters most, over {n_samples} prompts or pairs", (f"Layer:{across}", *columns), rows)

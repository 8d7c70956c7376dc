"""`main.py heads sweep`: every head taken out, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.answers import Emotion, MaxTokens, Output, Profiles, SampleNum, Seed, number
from AutomaticEval.cli.options import one_line_errors
from AutomaticEval.errors import SelectionError


@one_line_errors
def sweep(
    model: options.Model = "demo",
    profile: Profiles = "baseline",
    emotion: Emotion = None,
    mode: Annotated[str, typer.Option("--mode", help="zero, or mean (over the profile's neutral prompts).")] = "zero",
    output: Output = Path("results"),
    sample_num: SampleNum = 16,
    max_tokens: MaxTokens = 15,
    seed: Seed = 42,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.LoadIn8Bit = False,
    load_in_4bit: options.LoadIn4Bit = False,
) -> None:
    """How much less likely the model's own answers become without each head. A sweep that was cut short goes on."""
    if emotion is None or profile is None:
        raise SelectionError("whose answers? Give --emotion, a category of the --profile.")
    if mode not in ("zero", "mean"):
        raise SelectionError(f"--mode is {mode!r}; write zero or mean.")
    options.quiet_libraries()
    from AutomaticEval.analysis.profiles import load_profile
    from AutomaticEval.analysis.results import new_results, write_json
    from AutomaticEval.analysis.sweeping import sweep_prompts
    from AutomaticEval.analysis.texts import drawn
    from AutomaticEval.models.loading import LoadOptions, load_model
    from AutomaticEval.report.bars import top_heads
    from AutomaticEval.report.heads import Panel, heatmaps
    from AutomaticEval.store.files import new_file

    files = new_results(output, "sweep.json", "head_reaction_heatmap.png", "top_heads.png")
    found = load_profile(profile)
    prompts = drawn(found.category(emotion), sample_num, seed)
    neutral = found.category(found.neutral) if mode == "mean" else None
    loaded = load_model(model, options=LoadOptions(dtype, device, device_map, load_in_8bit, load_in_4bit))
    settings: dict[str, Any] = {
        "model": model,
        "weights": loaded.fingerprint(),
        "profile": profile,
        "emotion": emotion,
        "mode": mode,
    }
    settings |= {"max_tokens": max_tokens, "prompts": prompts, "dtype": str(loaded.model.dtype)}
    result = sweep_prompts(loaded, prompts, output / "sweep", settings, neutral=neutral, max_new_tokens=max_tokens)
    changes = {(each["layer"], each["head"]): each["change"] for each in result["heads"]}
    means = {key: each["mean"] for key, each in changes.items()}
    unit = "change of the answers' log-likelihood, nats"
    with new_file(files[1]) as partial:
        heatmaps([Panel(f"{model}, {emotion}: without each head ({mode})", means, unit, diverging=True)], partial)
    with new_file(files[2]) as partial:
        top_heads(changes, unit, f"{model}, {emotion}: heads that matter most ({mode})", partial)
    write_json(files[0], {"settings": settings, **result})
    strongest = sorted(changes.items(), key=lambda item: -abs(item[1]["mean"]))[:10]
    rows = [(f"{layer}:{head}", number(each)) for (layer, head), each in strongest]
    options.print_table("Heads that matter most", ("Head", "Change of log-likelihood, nats (95 % interval)"), rows)
    typer.echo(f"Written:     {', '.join(map(str, files))}")

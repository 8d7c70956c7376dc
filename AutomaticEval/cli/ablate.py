"""`main.py heads ablate`: what a model answers, and how it scores, without some of its heads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.interventions import (
    BatchSize,
    Emotion,
    MaxTokens,
    Output,
    Profiles,
    SampleNum,
    Seed,
    Sentiment,
    Temperature,
    answered,
    metrics_of,
)
from AutomaticEval.cli.options import one_line_errors, with_load
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import PromptError, SelectionError

if TYPE_CHECKING:
    from AutomaticEval.analysis.heads.ablate import Ablation
    from AutomaticEval.analysis.words.profiles import Profile


@one_line_errors
@with_load
def ablate(
    load: options.Load,
    context: typer.Context,
    head_spec: Annotated[str, typer.Option("--head-spec", help="layer:head, such as 0:0,3:5; 3:* for all of a layer.")],
    mode: Annotated[
        str, typer.Option("--mode", help="zero, mean or resample (over the profile's neutral prompts).")
    ] = "zero",
    model: options.Model = "demo",
    profile: Profiles = None,
    emotion: Emotion = None,
    data_path: Annotated[
        Path | None, typer.Option("--data_path", help="Prompts of your own, in place of --profile.")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", help="Score these lm-eval tasks with and without.")
    ] = None,
    limit: options.Limit = None,
    num_fewshot: options.NumFewshot = None,
    include_path: options.IncludePath = None,
    output: Output = Path("results"),
    sample_num: SampleNum = None,
    max_tokens: MaxTokens = 15,
    temperature: Temperature = 0.0,
    sentiment: Sentiment = "vader",
    batch_size: BatchSize = 8,
    seed: Seed = 42,
) -> None:
    """Answers, text metrics and benchmark scores with heads taken out, beside those without."""
    if benchmark is None:
        options.refuse_unused(context, "it is of a --benchmark", "limit", "num_fewshot", "include_path")
    if emotion is None and data_path is None:
        of_answers = ("sample_num", "max_tokens", "temperature", "sentiment")
        options.refuse_unused(context, "it is of prompts, and none are asked", *of_answers)
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.ablate import Ablation, parse_head_spec, reference_z
    from AutomaticEval.analysis.words.profiles import load_profile
    from AutomaticEval.capture.generation import Sampling
    from AutomaticEval.capture.texts.sources import drawn
    from AutomaticEval.models.loading import load_model
    from AutomaticEval.report.figures import names_of, save_with_figures
    from AutomaticEval.store.disk.json_files import new_results, write_json

    file, *_ = new_results(output, "ablation.json", *names_of("ablation"))
    found = None if profile is None else load_profile(profile)
    prompts = drawn(_prompts(found, emotion, data_path), sample_num, seed)
    if not prompts and benchmark is None:
        raise PromptError("nothing is asked: give --profile with --emotion, --data_path, or --benchmark.")
    if mode != "zero" and found is None:
        raise SelectionError(f"--mode {mode} takes its values from the neutral prompts of a --profile; name one.")
    if mode == "resample" and benchmark is not None:
        raise SelectionError(
            "--mode resample draws by position, which a benchmark's batches do not keep; use zero or mean."
        )
    if benchmark is not None:
        options.tell_of_code(benchmark, include_path, partial(say, err=True))
    loaded = load_model(model, options=load())
    heads = parse_head_spec(head_spec, loaded.layout.n_layers, loaded.layout.n_heads)
    neutral = [] if found is None else found.category(found.neutral)
    reference = None if mode == "zero" else reference_z(loaded, list(heads), neutral, batch_size)
    ablation = Ablation(loaded, heads, mode, reference, seed)
    settings: dict[str, Any] = {
        "model": loaded.name,
        "heads": head_spec,
        "mode": mode,
        "profile": profile,
        "emotion": emotion,
        "seed": seed,
    }
    settings |= {"temperature": temperature, "max_tokens": max_tokens, "reference": f"{len(neutral)} neutral prompts"}
    results: dict[str, Any] = {"kind": "ablation", "settings": settings}
    if prompts:
        sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, seed=seed)
        words = None if found is None or emotion is None else found.keywords.get(emotion)
        results |= answered(ablation, prompts, sampling, metrics_of(sentiment, words), batch_size)
    if benchmark is not None:
        results["benchmark"] = _scores(ablation, benchmark, limit, num_fewshot, include_path, batch_size)
    if prompts:
        written = save_with_figures(file, results)
    else:
        write_json(file, results)
        written = [file]
    say(f"Written:     {', '.join(map(str, written))}")


def _prompts(profile: Profile | None, emotion: str | None, data_path: Path | None) -> list[str]:
    from AutomaticEval.capture.texts.sources import read_texts

    if data_path is not None:
        if emotion is not None:
            raise SelectionError("--emotion and --data_path both name prompts; give one of them.")
        return read_texts(data_path)
    if emotion is None:
        return []
    if profile is None:
        raise SelectionError("--emotion names a category of a profile; add --profile.")
    return profile.category(emotion)


def _scores(
    ablation: Ablation,
    names: str,
    limit: float | None,
    num_fewshot: int | None,
    include_path: list[Path] | None,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Each task's scores with the heads and without them."""
    from AutomaticEval.evaluation.benchmark import Benchmark
    from AutomaticEval.evaluation.run import run_benchmark

    asked = Benchmark(
        names=tuple(name.strip() for name in names.split(",") if name.strip()),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        include_path=tuple(map(str, include_path or ())),
    )
    before = run_benchmark(ablation.loaded, asked)
    with ablation.applied():
        after = run_benchmark(ablation.loaded, asked)
    pairs = list(zip(before.scores, after.scores, strict=True))
    rows = [(one.task, one.metric, f"{one.value:.4f}", f"{other.value:.4f}") for one, other in pairs]
    print_table("Benchmark without the heads", ("Task", "Metric", "Before", "After"), rows)
    return [
        {"task": one.task, "metric": one.metric, "before": one.value, "after": other.value, "n": one.answered}
        for one, other in pairs
    ]

"""What the commands that change a model's answers share: their options, and how they write and print what changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli.printing import print_table

if TYPE_CHECKING:
    from AutomaticEval.analysis.parts.before_after import Intervention
    from AutomaticEval.analysis.result import Estimate
    from AutomaticEval.analysis.words.metrics import TextMetric
    from AutomaticEval.capture.generation import Sampling

Profiles = Annotated[
    str | None, typer.Option("--profile", help="baseline, extended, or a .toml file: prompts and keywords.")
]
Emotion = Annotated[str | None, typer.Option("--emotion", help="The category of the profile to ask.")]
Sentiment = Annotated[
    str, typer.Option("--sentiment", help="vader, or a Hugging Face text classifier, as NAME or NAME@LABEL.")
]
SampleNum = Annotated[int | None, typer.Option("--sample_num", help="So many of the prompts, drawn at random.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Of each answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Prompts a forward.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn at random.")]
Pairs = Annotated[
    Path | None, typer.Option("--pairs", help="JSONL of clean, corrupted, answer, wrong, in place of a profile.")
]
SiteOption = Annotated[str, typer.Option("--site", help="z, mlp_out or resid_post.")]
Output = Annotated[Path, typer.Option("--output", help="Folder for results; nothing there is overwritten.")]


def metrics_of(sentiment: str, words: Sequence[str] | None) -> list[TextMetric]:
    """Sentiment, and the keywords of a category that has some."""
    from AutomaticEval.analysis.words.metrics import classifier, keywords, vader

    name, _, label = sentiment.partition("@")
    return [vader() if name == "vader" else classifier(name, label or None), *([keywords(words)] if words else [])]


def answered(
    intervention: Intervention,
    prompts: list[str],
    sampling: Sampling,
    metrics: Sequence[TextMetric],
    batch_size: int,
) -> dict[str, Any]:
    """What `answers_with` gives, as JSON; printed, too."""
    from AutomaticEval.analysis.parts.before_after import answers_with

    result = answers_with(intervention, prompts, metrics, sampling, batch_size=batch_size)
    summary = result.measured["summary"]
    rows = [(metric, *(number(each) for each in values.values())) for metric, values in summary.items()]
    print_table("Answers", ("Metric", "Before", "After", "Change (95 % interval)"), rows)
    return result.as_json()


def number(estimate: Estimate) -> str:
    """A mean with its interval."""
    if estimate.mean is None:
        return "none"
    interval = estimate.interval
    return f"{estimate.mean:.4g}" + ("" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g})")

"""What the commands that change a model's answers share: their options, and how they write and print what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from AutomaticEval.cli.options import RUN
from AutomaticEval.cli.printing import print_table
from AutomaticEval.options import Option

if TYPE_CHECKING:
    from AutomaticEval.analysis.parts.before_after import Intervention
    from AutomaticEval.analysis.words.metrics import TextMetric
    from AutomaticEval.analysis.words.profiles import Profile
    from AutomaticEval.capture.sampling import Sampling

T = TypeVar("T")

HeadSpec = Annotated[
    str,
    typer.Option("--head_spec", help="layer:head, such as 0:0,3:5; 3:* for all heads of a layer.", rich_help_panel=RUN),
]
Sentiment = Annotated[
    str,
    typer.Option(
        "--sentiment", help="vader, or a Hugging Face text classifier, as NAME or NAME@LABEL.", rich_help_panel=RUN
    ),
]
Pairs = Annotated[
    Path | None,
    typer.Option(
        "--pairs", help="JSONL of clean, corrupted, answer, wrong, in place of a profile.", rich_help_panel=RUN
    ),
]
SiteOption = Annotated[str, typer.Option("--site", help="z, mlp_out or resid_post.", rich_help_panel=RUN)]


@dataclass(frozen=True)
class Prompts:
    """Which prompts are asked."""

    profile: Annotated[str | None, Option("baseline, extended, or a .toml file: labelled prompts and keywords.")] = None
    category: Annotated[str | None, Option("The category of the profile whose prompts are asked.")] = None
    num_trials: Annotated[int | None, Option("So many of the prompts or pairs, drawn at random. Default: all.")] = None
    seed: Annotated[int, Option("Seed for everything that is drawn at random.", minimum=0)] = 42

    def load_profile(self) -> Profile | None:
        """The profile, when one is named."""
        from AutomaticEval.analysis.words.profiles import load_profile

        return None if self.profile is None else load_profile(self.profile)

    def drawn(self, items: list[T]) -> list[T]:
        """The items that are asked."""
        from AutomaticEval.capture.texts.sources import drawn

        return drawn(items, self.num_trials, self.seed)


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
    """What `answers_with` gives, and the metrics' units; printed, too."""
    from AutomaticEval.analysis.parts.before_after import answers_with

    found = answers_with(intervention, prompts, metrics, sampling, batch_size=batch_size)
    units = {metric.name: metric.unit for metric in metrics} | {"logprob": "log-likelihood of the answer before, nats"}
    rows = [(metric, *(number(each) for each in values.values())) for metric, values in found["summary"].items()]
    print_table("Answers", ("Metric", "Before", "After", "Change (95 % interval)"), rows)
    return {"units": units, **found}


def number(found: dict[str, Any]) -> str:
    """A mean with its interval."""
    if found["mean"] is None:
        return "none"
    interval = found["interval"]
    return f"{found['mean']:.4g}" + ("" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g})")

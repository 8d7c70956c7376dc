"""What the commands that change a model's answers share: their options, and the table of what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from AutomaticEval.cli.finish import Table
from AutomaticEval.cli.options import RUN
from AutomaticEval.cli.printing import say
from AutomaticEval.errors import SelectionError
from AutomaticEval.options import Option
from AutomaticEval.public_names import public_name

if TYPE_CHECKING:
    from AutomaticEval.analysis.result import Estimate, Result
    from AutomaticEval.analysis.words.metrics import TextMetric
    from AutomaticEval.analysis.words.profiles import Profile
    from AutomaticEval.capture.sampling import Sampling

T = TypeVar("T")

HeadSpec = Annotated[
    str,
    typer.Option("--head_spec", help="layer:head, such as 0:0,3:5; 3:* for all heads of a layer.", rich_help_panel=RUN),
]
OwnTexts = Annotated[
    Path | None, typer.Option("--texts", help="Prompts of your own, in place of --category.", rich_help_panel=RUN)
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
        "--pairs",
        help="JSONL, CSV, TSV or parquet: clean, corrupted, answer, wrong, in place of a profile.",
        rich_help_panel=RUN,
    ),
]
SiteOption = Annotated[str, typer.Option("--site", help="z, mlp_out or resid_post.", rich_help_panel=RUN)]


@dataclass(frozen=True)
class Prompts:
    """Which prompts are asked."""

    profile: Annotated[str | None, Option("baseline, extended, or a .toml file: labelled prompts and keywords.")] = None
    category: Annotated[str | None, Option("A category of the profile.")] = None
    num_trials: Annotated[
        int | None,
        Option("So many of the prompts, texts or pairs, drawn at random; all when there are no more."),
    ] = None
    seed: Annotated[int, Option("Seed for everything that is drawn at random.", minimum=0)] = 42

    def load_profile(self) -> Profile | None:
        """The profile that is named, or None."""
        from AutomaticEval.analysis.words.profiles import load_profile

        return None if self.profile is None else load_profile(self.profile)

    def drawn(self, items: list[T]) -> list[T]:
        """The items that are asked."""
        from AutomaticEval.capture.texts.sources import drawn

        return drawn(items, self.num_trials, self.seed)

    def keywords(self, profile: Profile | None) -> Sequence[str] | None:
        """The keywords of the category; None when there are none."""
        return None if profile is None or self.category is None else profile.keywords.get(self.category)

    def asked_as(self, sampling: Sampling, sentiment: str) -> dict[str, Any]:
        """What a result file says of how prompts were chosen and answered."""
        return {
            "profile": self.profile and public_name(self.profile),
            "emotion": self.category,
            "num_trials": self.num_trials,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "sentiment": sentiment,
        }


SIGNIFICANT = 0.05


def tell_of_few(n: int, what: str) -> None:
    """Say it before the model loads when n prompts or pairs are too few for any change to be told from chance."""
    from AutomaticEval.analysis.numbers.signs import least_p

    if n:
        tell_of_unreachable(f"{n} {what}", least_p(n))


def tell_of_unreachable(asked: str, least: float) -> None:
    """Say that no p value can be below 0.05, when so. least: the smallest p value that can be."""
    if least >= SIGNIFICANT:
        say(
            f"{asked}: no p value can be below {least:.2g}, so that nothing can be told from chance at {SIGNIFICANT}. Ask more for that.",
            err=True,
        )


def asked_prompts(profile: Profile | None, category: str | None, texts: Path | None) -> list[str]:
    """The prompts of a category, or of a file; [] when neither is named. Raises SelectionError for both, and for a category of no profile."""
    from AutomaticEval.capture.texts.sources import read_texts

    if texts is not None:
        if category is not None:
            raise SelectionError("--category and --texts both name prompts; give one of them.")
        return read_texts(texts)
    if category is None:
        return []
    if profile is None:
        raise SelectionError("--category names a category of a profile; add --profile.")
    return profile.category(category)


def metrics_of(sentiment: str, words: Sequence[str] | None) -> list[TextMetric]:
    """The metrics of an answer: its sentiment, and the keywords of a category that has some."""
    from AutomaticEval.analysis.words.metrics import classifier, keywords, vader

    name, _, label = sentiment.partition("@")
    return [vader() if name == "vader" else classifier(name, label or None), *([keywords(words)] if words else [])]


def answers_table(result: Result) -> Table:
    """The metrics of answers before and after an intervention, for a person to read."""
    summary = result.measured["summary"]
    rows = [(metric, *(number(each) for each in values.values())) for metric, values in summary.items()]
    return Table("Answers", ("Metric", "Before", "After", "Change (95 % interval)"), rows)


def number(estimate: Estimate) -> str:
    """A mean with its interval, and of an effect p, as text."""
    from AutomaticEval.analysis.result import Effect

    if estimate.mean is None:
        return "none"
    interval = "" if estimate.interval is None else " ({:.3g} to {:.3g})".format(*estimate.interval)
    p = f", p {estimate.p:.2g}" if isinstance(estimate, Effect) and estimate.p is not None else ""
    return f"{estimate.mean:.4g}{interval}{p}"

"""Which heads react to a category of prompts: how their strength changes, what they attend to, what they add to the logits of its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.analysis.numbers import permutation
from AutomaticEval.analysis.numbers.estimate import mean_intervals, methods
from AutomaticEval.analysis.numbers.permutation import differences
from AutomaticEval.analysis.parts.head_measures import HeadMeter
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.analysis.words.profiles import Profile
from AutomaticEval.analysis.words.targets import Target, targets_of
from AutomaticEval.errors import PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel


@dataclass(frozen=True)
class StrengthChange:
    """How a head's strength differs between the prompts of a category and the neutral ones."""

    change: float
    """The mean over the category's prompts minus that over the neutral prompts."""
    d: float
    """Cohen's d."""
    p: float
    """The p value of a permutation test, corrected over all heads."""


@dataclass(frozen=True)
class DirectEstimate(Estimate):
    """What a head adds to the logits of a category's words: the mean over its prompts, with interval."""

    neutral: float | None = None
    """The mean over the neutral prompts."""


@dataclass(frozen=True)
class HeadScore:
    """The three scores of one head for one category; docs/heads.md defines them."""

    layer: int
    head: int
    category: str
    strength: StrengthChange
    attention: Estimate
    """Attention to keywords above uniform. Its mean is None for a category without keywords."""
    direct: DirectEstimate
    """In logits. Its mean is None for a category without a target."""


def screen(
    loaded: LoadedModel,
    profile: Profile,
    targets: Mapping[str, Target] | None = None,
    *,
    n_permutations: int = 2000,
    seed: int = 42,
    batch_size: int = 8,
) -> Result:
    """Scores of every head for every category of a profile but the neutral one. Measured are scores: a list of HeadScore.

    profile: at least two prompts for each category. targets: category -> the tokens whose logits are compared; by default those of its
    keywords. Raises PromptError for categories and prompts that cannot be screened, SiteUnavailable for a model that lacks what is read.
    """
    _check_prompts(profile, batch_size)
    categories = [name for name in profile.prompts if name != profile.neutral]
    words = {name: list(profile.keywords.get(name, ())) for name in categories}
    targets = targets_of(loaded.tokenizer, words) if targets is None else targets
    with_target = [name for name in categories if name in targets]
    meter = HeadMeter(loaded, [targets[name] for name in with_target], batch_size)
    with tqdm(total=sum(map(len, profile.prompts.values())), desc="Screening", unit="prompt") as progress:
        measured = {
            name: meter.measure(texts, words.get(name, ()), progress) for name, texts in profile.prompts.items()
        }
    base = measured[profile.neutral]
    rounding = max(1e-6, torch.finfo(loaded.model.dtype).eps)
    scores = []
    for category in categories:
        own = measured[category]
        target = with_target.index(category) if category in targets else None
        columns = zip(
            _changes(own.strength, base.strength, n_permutations, seed, rounding),
            _attention(own.attention),
            _direct(own.direct, base.direct, target),
            strict=True,
        )
        for number, (strength, attention, direct) in enumerate(columns):
            layer, head = divmod(number, loaded.layout.n_heads)
            scores.append(HeadScore(layer, head, category, strength, attention, direct))
    n_heads = loaded.layout.n_layers * loaded.layout.n_heads
    return Result("screening", {"scores": scores}, methods=methods(n_heads, p=permutation.METHOD))


def _check_prompts(profile: Profile, batch_size: int) -> None:
    """Raises PromptError for what cannot be screened."""
    prompts, neutral = profile.prompts, profile.neutral
    if neutral not in prompts or len(prompts) < 2:
        raise PromptError(
            f"there are prompts of {', '.join(prompts) or 'nothing'}; {neutral!r} and another category are needed."
        )
    for name, texts in prompts.items():
        if len(texts) < 2:
            raise PromptError(f"{name} has {len(texts)} prompts; to tell categories apart takes two at least.")
    if batch_size < 1:
        raise PromptError(f"batch_size is {batch_size}; it must be 1 or more.")


def _changes(own: Tensor, base: Tensor, n_permutations: int, seed: int, rounding: float) -> list[StrengthChange]:
    """For each head how its strength differs. own, base: [n_prompts, n_layers, n_heads]."""
    values = torch.cat([own, base]).flatten(1).double().numpy()
    is_own = np.arange(len(values)) < len(own)
    columns = differences(values, is_own, n_permutations, seed, rounding)
    return [StrengthChange(float(change), float(d), float(p)) for change, d, p in zip(*columns, strict=True)]


def _attention(values: Tensor) -> list[Estimate]:
    """For each head an estimate over the prompts in which attention to keywords is defined. values: [n_prompts, n_layers, n_heads]."""
    return mean_intervals(values.flatten(1).double().numpy())


def _direct(own: Tensor, base: Tensor, target: int | None) -> list[DirectEstimate]:
    """For each head its effect on one target. own, base: [n_prompts, n_targets, n_layers, n_heads]."""
    if target is None:
        return [DirectEstimate(None, None, 0)] * own[0, 0].numel()
    at_neutral = base[:, target].double().mean(0).flatten().tolist()
    estimates = mean_intervals(own[:, target].flatten(1).double().numpy())
    return [DirectEstimate(**vars(each), neutral=neutral) for each, neutral in zip(estimates, at_neutral, strict=True)]

"""Which heads react to a category of prompts: how their strength changes, what they attend to, what they add to the logits of its words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.analysis.numbers import permutation
from AutomaticEval.analysis.numbers.estimate import mean_intervals, methods
from AutomaticEval.analysis.numbers.permutation import Differences, differences
from AutomaticEval.analysis.numbers.two_groups import mean_differences
from AutomaticEval.analysis.parts.head_measures import HeadMeasures, HeadMeter, Listener, Prompt, encoded
from AutomaticEval.analysis.parts.same_positions import SamePositions, at_same_positions
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.analysis.words.placebos import p_beside_placebos, placebo_targets
from AutomaticEval.analysis.words.profiles import Profile
from AutomaticEval.analysis.words.targets import Target, targets_of
from AutomaticEval.capture.draws import random_numbers
from AutomaticEval.errors import PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

Array = np.ndarray[Any, np.dtype[np.float64]]
WELCH = "Welch's t, of the category's prompts and of the neutral ones"
PLACEBO = "99 draws of other tokens of the prompts, corrected by the largest difference over all heads of a category (single-step maxT)"


@dataclass(frozen=True)
class StrengthChange:
    """How a head's strength differs between the prompts of a category and the neutral ones, at the positions that both have."""

    change: float
    """The mean over the category's prompts minus that over the neutral prompts."""
    d: float
    """Cohen's d."""
    p: float
    """The p value of a permutation test, corrected over all heads."""


@dataclass(frozen=True, kw_only=True)
class AttentionEstimate(Estimate):
    """The attention that a head pays to keywords minus what it pays to placebo words: other words at the same positions of other prompts of the
    category, seen from the same positions."""

    paid: float | None
    """The attention paid to keywords; what is expected of their positions is this minus the mean."""
    beside_neutral: Estimate
    """The same with the words of the neutral prompts, at the same positions, as placebo words."""


@dataclass(frozen=True, kw_only=True)
class DirectEstimate(Estimate):
    """What a head adds to the logits of a category's words: the mean over its prompts minus the mean over the neutral prompts."""

    own: float | None
    """The mean over the category's prompts."""
    neutral: float | None
    """The mean over the neutral prompts."""
    p: float | None
    """How often placebo words in place of the category's words give as large a difference, corrected over all heads."""


@dataclass(frozen=True)
class HeadScore:
    """The three scores of one head for one category; docs/heads.md defines them."""

    layer: int
    head: int
    category: str
    strength: StrengthChange
    attention: AttentionEstimate
    """Its mean is None for a category without keywords."""
    direct: DirectEstimate
    """In logits. Its mean is None for a category without a target."""


@dataclass(frozen=True)
class LengthChange:
    """How the lengths of a category's prompts differ from those of the neutral ones, in tokens."""

    mean: float
    neutral: float
    change: float
    d: float
    """Cohen's d."""
    p: float
    """The p value of a permutation test."""
    n_positions: int
    """How many positions prompts of both have; strength is compared at these."""


def screen(
    loaded: LoadedModel,
    profile: Profile,
    targets: Mapping[str, Target] | None = None,
    *,
    n_permutations: int = 2000,
    seed: int = 42,
    batch_size: int = 8,
) -> Result:
    """Scores of every head, in the layers that have heads, for every category of a profile but the neutral one. Measured are lengths (category -> LengthChange) and scores, a
    list of HeadScore.

    profile: at least two prompts for each category. targets: category -> the tokens whose logits are compared; by default those of its
    keywords. Raises PromptError for categories and prompts that cannot be screened, SiteUnavailable for a model that lacks what is read.
    """
    _check_prompts(profile, batch_size)
    loaded.layout.where_held(loaded.layout.sites("head_result_norm"))
    asked = _Asked.of(loaded, profile, targets, seed)
    meter = HeadMeter(loaded, [target for each in asked.targets.values() for target in each], batch_size)
    with tqdm(total=sum(map(len, profile.prompts.values())), desc="Screening", unit="prompt") as progress:
        measured = {
            name: meter.measure(prompts, asked.listeners(name), progress) for name, prompts in asked.prompts.items()
        }
    base = measured[profile.neutral]
    rounding = max(1e-6, torch.finfo(loaded.model.dtype).eps)
    test = partial(differences, n_permutations=n_permutations, seed=seed, rounding=rounding)
    scores: list[HeadScore] = []
    lengths: dict[str, LengthChange] = {}
    for category in asked.categories:
        own = measured[category]
        lengths[category] = _lengths(own, base, test)
        columns = zip(
            _changes(own, base, test),
            asked.attention(category),
            _direct(own.direct, base.direct, asked.columns(category)),
            strict=True,
        )
        for number, (strength, attention, direct) in enumerate(columns):
            place, head = divmod(number, loaded.layout.n_heads)
            scores.append(HeadScore(meter.layers[place], head, category, strength, attention, direct))
    about = methods(asked.n_heads, p=f"of strength: {permutation.METHOD}", direct_interval=WELCH, direct_p=PLACEBO)
    return Result("screening", {"lengths": lengths, "scores": scores}, methods=about)


@dataclass
class _Asked:
    """What is asked of a model: prompts, and the tokens that each category's scores are about."""

    neutral: str
    prompts: dict[str, list[Prompt]]
    """Category -> its prompts, in which the category's keywords are marked."""
    targets: dict[str, list[Target]]
    """Category -> its target and, after it, targets of placebo words."""
    same: dict[str, tuple[SamePositions, SamePositions]]
    """Category -> attention to its keywords beside placebo words of its own prompts, and of the neutral prompts."""
    n_heads: int
    """Of all layers that have heads."""

    @classmethod
    def of(cls, loaded: LoadedModel, profile: Profile, targets: Mapping[str, Target] | None, seed: int) -> _Asked:
        words = {name: list(profile.keywords.get(name, ())) for name in profile.prompts if name != profile.neutral}
        chosen = targets_of(loaded.tokenizer, words) if targets is None else targets
        prompts = {name: encoded(loaded, texts, words.get(name, ())) for name, texts in profile.prompts.items()}
        tokens = {token for each in prompts.values() for prompt in each for token in prompt.ids}
        with_placebos = {
            name: [chosen[name], *placebo_targets(chosen[name], tokens, random_numbers(seed, "placebo words", name))]
            for name in words
            if name in chosen
        }
        shape, same = (len(loaded.layout.layers_of("z")), loaded.layout.n_heads), {}
        for name, own_words in words.items():
            if own_words:
                marks, neutral_marks = (
                    [prompt.marks for prompt in each]
                    for each in (prompts[name], encoded(loaded, profile.prompts[profile.neutral], own_words))
                )
                same[name] = SamePositions(marks, None, *shape), SamePositions(marks, neutral_marks, *shape)
        return cls(profile.neutral, prompts, with_placebos, same, shape[0] * shape[1])

    @property
    def categories(self) -> list[str]:
        return [name for name in self.prompts if name != self.neutral]

    def listeners(self, name: str) -> list[Listener]:
        """What is told the patterns of a category's prompts."""
        if name == self.neutral:
            return [beside_neutral.add_pool for _, beside_neutral in self.same.values()]
        return [each.add for each in self.same.get(name, ())]

    def attention(self, category: str) -> list[AttentionEstimate]:
        """For each head its attention to the category's keywords."""
        if category not in self.same:
            return [AttentionEstimate(None, None, 0, paid=None, beside_neutral=Estimate(None, None, 0))] * self.n_heads
        among_own, beside_neutral = (each.result() for each in self.same[category])
        own = mean_intervals(_flat(among_own.own - among_own.pool))
        neutral = mean_differences(_flat(beside_neutral.own), _flat(beside_neutral.pool))
        return [
            AttentionEstimate(**vars(each), paid=None if each.mean is None else float(paid), beside_neutral=other)
            for each, paid, other in zip(own, among_own.paid.flatten(), neutral, strict=True)
        ]

    def columns(self, category: str) -> slice:
        """Which of all targets are the category's: its own, then its placebos."""
        start = 0
        for name, targets in self.targets.items():
            if name == category:
                return slice(start, start + len(targets))
            start += len(targets)
        return slice(0, 0)


def _flat(values: Array) -> Array:
    """[n, n_layers, n_heads] -> [n, n_layers * n_heads]"""
    return values.reshape(len(values), -1)


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


def _lengths(own: HeadMeasures, base: HeadMeasures, test: Callable[..., Differences]) -> LengthChange:
    lengths = [np.array([len(each) for each in group.norms], np.float64) for group in (own, base)]
    values = np.concatenate(lengths)
    found = test(values[:, None], np.arange(len(values)) < len(lengths[0]))
    mean, neutral = (float(each.mean()) for each in lengths)
    n_positions = int(min(each.max() for each in lengths))
    return LengthChange(mean, neutral, mean - neutral, float(found.d[0]), float(found.p[0]), n_positions)


def _changes(own: HeadMeasures, base: HeadMeasures, test: Callable[..., Differences]) -> list[StrengthChange]:
    """For each head how its strength differs."""
    groups = [[each.flatten(1).double().numpy() for each in group.norms] for group in (own, base)]
    one, other, _ = at_same_positions(*groups)
    found = test(np.concatenate([one, other]), np.arange(len(one) + len(other)) < len(one))
    return [
        StrengthChange(float(change), float(d), float(p))
        for change, d, p in zip(found.change, found.d, found.p, strict=True)
    ]


def _direct(own: Tensor, base: Tensor, columns: slice) -> list[DirectEstimate]:
    """For each head its effect on one target. own, base: [n_prompts, n_targets, n_layers, n_heads]. columns: the target, then its placebos."""
    if columns.stop == columns.start:
        return [DirectEstimate(None, None, 0, own=None, neutral=None, p=None)] * own[0, 0].numel()
    groups = [each[:, columns].flatten(2).double().numpy() for each in (own, base)]  # [n_prompts, n_targets, heads]
    estimates = mean_differences(groups[0][:, 0], groups[1][:, 0])
    changes = groups[0].mean(0) - groups[1].mean(0)
    means = [each[:, 0].mean(0).tolist() for each in groups]
    p = [None if math.isnan(each) else float(each) for each in p_beside_placebos(changes[0], changes[1:])]
    return [
        DirectEstimate(**vars(each), own=of_own, neutral=of_neutral, p=chance)
        for each, of_own, of_neutral, chance in zip(estimates, *means, p, strict=True)
    ]

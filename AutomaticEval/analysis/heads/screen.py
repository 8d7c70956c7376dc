"""Which heads react to a category of prompts: how their strength changes, what they attend to, what they add to the logits of its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.analysis.numbers.estimate import mean_intervals
from AutomaticEval.analysis.numbers.permutation import differences
from AutomaticEval.analysis.parts.direct_effect import DirectEffects
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.analysis.words.metrics import whole_words
from AutomaticEval.analysis.words.profiles import Profile
from AutomaticEval.analysis.words.targets import Target, targets_of, tokens_within
from AutomaticEval.capture.batch_independence import Span, apart
from AutomaticEval.capture.texts.forward import Batch, padded, recorded
from AutomaticEval.capture.tree.suitability import most_columns, window_of
from AutomaticEval.errors import PromptError
from AutomaticEval.models.attention import check_patterns, reading_patterns
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site


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
class DirectEffect(Estimate):
    """What a head adds to the logits of a category's words: the mean over its prompts, with interval."""

    neutral: float | None
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
    direct: DirectEffect
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
    reading = _Reading(loaded, [targets[name] for name in with_target], batch_size)
    with tqdm(total=sum(map(len, profile.prompts.values())), desc="Screening", unit="prompt") as progress:
        measured = {name: reading.over(texts, words.get(name, ()), progress) for name, texts in profile.prompts.items()}
    base = measured[profile.neutral]
    rounding = max(1e-6, torch.finfo(loaded.model.dtype).eps)
    scores = []
    for category in categories:
        own = measured[category]
        target = with_target.index(category) if category in targets else None
        columns = zip(
            _changes(own.strength, base.strength, n_permutations, seed, rounding),
            _attention(own.attention, seed),
            _direct(own.direct, base.direct, target, seed),
            strict=True,
        )
        for number, (strength, attention, direct) in enumerate(columns):
            layer, head = divmod(number, loaded.layout.n_heads)
            scores.append(HeadScore(layer, head, category, strength, attention, direct))
    return Result("screening", {"scores": scores})


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


def _attention(values: Tensor, seed: int) -> list[Estimate]:
    """For each head an estimate over the prompts in which attention to keywords is defined. values: [n_prompts, n_layers, n_heads]."""
    flat = values.flatten(1)
    return mean_intervals(flat[~flat.isnan().all(1)].double().numpy(), seed)


def _direct(own: Tensor, base: Tensor, target: int | None, seed: int) -> list[DirectEffect]:
    """For each head its effect on one target. own, base: [n_prompts, n_targets, n_layers, n_heads]."""
    if target is None:
        return [DirectEffect(None, None, 0, None)] * own[0, 0].numel()
    at_neutral = base[:, target].double().mean(0).flatten().tolist()
    estimates = mean_intervals(own[:, target].flatten(1).double().numpy(), seed)
    return [
        DirectEffect(each.mean, each.interval, each.n, neutral)
        for each, neutral in zip(estimates, at_neutral, strict=True)
    ]


class _Measured(NamedTuple):
    """What was measured of each head in some prompts."""

    strength: Tensor
    """[n_prompts, n_layers, n_heads]: the mean norm of the head's result over the prompt's tokens."""
    attention: Tensor
    """[n_prompts, n_layers, n_heads]: attention to keywords above uniform; NaN in prompts where it is not defined."""
    direct: Tensor
    """[n_prompts, n_targets, n_layers, n_heads], in logits, at the last token."""


class _Reading:
    """Reads all three scores from one forward of each prompt."""

    def __init__(self, loaded: LoadedModel, targets: Sequence[Target], batch_size: int) -> None:
        self._loaded, self._layout, self._batch_size = loaded, loaded.layout, batch_size
        check_patterns(loaded.model, self._layout)
        self._effects = DirectEffects(loaded, targets) if targets else None
        self._norms = self._layout.pick(Site("head_result_norm", layer) for layer in range(self._layout.n_layers))
        limits = [window_of(loaded.model), most_columns(loaded.model), loaded.context]
        self._longest = min((limit for limit in limits if limit is not None), default=None)

    def over(self, texts: Sequence[str], words: Sequence[str], progress: Any) -> _Measured:
        """What is measured in each text, in their order. Padding is on the right, where no token looks, so it changes nothing.

        words: the keywords of the texts' category. progress: a bar of tqdm, over texts.
        """
        pattern = whole_words(words) if words else None
        measured: list[_Measured] = []
        order: list[int] = []
        for start in range(0, len(texts), self._batch_size):
            batch = [self._encoded(text, pattern) for text in texts[start : start + self._batch_size]]
            for group in apart(self._loaded.model, [Span(len(ids), len(ids)) for ids, _ in batch]):
                marks = padded([list(map(int, batch[row][1])) for row in group]).ids.bool()
                measured.append(self._batch(padded([batch[row][0] for row in group]), marks))
                order += [start + row for row in group]
            progress.update(len(batch))
        place = torch.tensor(order).argsort()
        return _Measured(*(torch.cat(column)[place] for column in zip(*measured, strict=True)))

    def _encoded(self, text: str, pattern: Pattern[str] | None) -> tuple[list[int], list[bool]]:
        """A text's token ids, and for each whether it is part of a keyword."""
        if pattern is None:
            ids = self._loaded.tokenizer(text)["input_ids"]
            marks = [False] * len(ids)
        else:
            ids, marks = tokens_within(self._loaded.tokenizer, text, pattern)
        if not ids or (self._longest is not None and len(ids) > self._longest):
            raise PromptError(
                f"a prompt of {len(ids)} tokens cannot be screened: 1 to {self._longest} can, for all of it must be seen by its last "
                f"token. It begins {text[:40]!r}."
            )
        return ids, marks

    def _batch(self, batch: Batch, marks: Tensor) -> _Measured:
        """What is measured in one batch. marks: [batch, pos], the tokens of keywords."""
        loaded, layout = self._loaded, self._layout
        keep = Kept(*batch.mask.nonzero(as_tuple=True))
        taps = {**self._norms, **(self._effects.taps if self._effects else {})}
        with reading_patterns(loaded.model, layout) as patterns:
            recording = recorded(loaded.model, layout, {**taps, "after": patterns.after}, batch, keep)
            attention = torch.stack(
                [_above_uniform(patterns.of(n, batch.mask), batch.mask, marks) for n in range(layout.n_layers)], 1
            )
        lengths = batch.mask.sum(1)
        last = lengths.cumsum(0) - 1
        strength = torch.stack([_row_means(recording.rows[key], lengths) for key in self._norms], 1)
        if self._effects is None:
            direct = strength.new_zeros(len(strength), 1, *strength.shape[1:])
        else:
            direct = self._effects.of({key: rows[last] for key, rows in recording.rows.items()})
        return _Measured(strength, attention, direct)


def _row_means(values: Tensor, lengths: Tensor) -> Tensor:
    """The mean over each row's tokens: [batch, n_heads]. values: [real tokens, n_heads], row after row."""
    return torch.stack([row.float().mean(0) for row in torch.split(values, lengths.tolist())])


def _above_uniform(pattern: Tensor, mask: Tensor, marks: Tensor) -> Tensor:
    """Attention to marked tokens minus the part of the visible tokens that is marked: [batch, n_heads].

    The mean is over positions that see both marked and other tokens; NaN in rows without such a position.
    pattern: [batch, n_heads, query_pos, key_pos]. mask: [batch, pos], the real tokens. marks: [batch, pos].
    """
    marked = marks.to(pattern.device).float()
    paid = torch.einsum("bhqk,bk->bhq", pattern.float(), marked)
    n_seen = torch.arange(1, marked.shape[1] + 1, device=pattern.device)
    n_marked = marked.cumsum(1)  # [batch, query_pos]
    sees_both = (n_marked > 0) & (n_marked < n_seen) & mask.to(pattern.device)
    above = (paid - (n_marked / n_seen)[:, None]) * sees_both[:, None]
    return (above.sum(-1) / sees_both.sum(-1)[:, None]).cpu()

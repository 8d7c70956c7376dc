"""Which heads react to a category of prompts: how their strength changes, what they attend to, what they add to the logits of its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.analysis.numbers.estimate import mean_intervals
from AutomaticEval.analysis.numbers.permutation import differences
from AutomaticEval.analysis.parts.direct_effect import DirectEffects
from AutomaticEval.analysis.words.metrics import whole_words
from AutomaticEval.analysis.words.targets import Target, targets_of, tokens_within
from AutomaticEval.capture.batch_independence import Span, apart
from AutomaticEval.capture.texts.forward import Batch, padded, recorded
from AutomaticEval.capture.tree.suitability import most_columns, window_of
from AutomaticEval.errors import PromptError
from AutomaticEval.models.attention import check_patterns, reading_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site


class Measured(NamedTuple):
    """What was measured of each head in the prompts of one category."""

    strength: Tensor
    """[n_prompts, n_layers, n_heads]: the mean norm of the head's result over the prompt's tokens."""
    attention: Tensor
    """The same shape: attention to keywords above uniform; NaN in prompts where that cannot be told."""
    direct: Tensor
    """[n_prompts, n_targets, n_layers, n_heads], in logits, at the last token."""


def screen(
    loaded: LoadedModel,
    prompts: Mapping[str, Sequence[str]],
    keywords: Mapping[str, Sequence[str]],
    targets: Mapping[str, Target] | None = None,
    neutral: str = "neutral",
    *,
    n_permutations: int = 2000,
    seed: int = 42,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Scores of every head for every category but the neutral one: layer, head, category, and strength, attention and direct.

    prompts: category -> at least two texts; `neutral` names those that strengths are compared with. keywords: category -> whole words.
    targets: category -> tokens; by default those of the keywords. strength: change, d and p (`differences`). attention: mean, interval and n
    over prompts; mean None for a category without keywords. direct: the same, and its mean over neutral prompts; for one without a target.
    docs/heads.md tells what they are. Raises PromptError, and SiteUnavailable for a model that lacks what is read.
    """
    categories = [name for name in prompts if name != neutral]
    if neutral not in prompts or not categories:
        raise PromptError(
            f"there are prompts of {', '.join(prompts) or 'nothing'}; {neutral!r} and another category are needed."
        )
    few = [name for name, texts in prompts.items() if len(texts) < 2]
    if few:
        raise PromptError(f"{few[0]} has {len(prompts[few[0]])} prompts; to tell categories apart takes two at least.")
    if batch_size < 1:
        raise PromptError(f"batch_size is {batch_size}; it must be 1 or more.")
    words = {name: list(keywords.get(name, ())) for name in categories}
    targets = targets_of(loaded.tokenizer, words) if targets is None else targets
    reading = _Reading(loaded, [targets[name] for name in categories if name in targets], batch_size)
    with tqdm(total=sum(map(len, prompts.values())), desc="Screening", unit="prompt") as progress:
        measured = {name: reading.over(texts, words.get(name, ()), progress) for name, texts in prompts.items()}
    places = {name: number for number, name in enumerate(each for each in categories if each in targets)}
    rounding = max(1e-6, torch.finfo(loaded.model.dtype).eps)
    scores = []
    for category in categories:
        own, base = measured[category], measured[neutral]
        columns = {
            "strength": _changes(own.strength, base.strength, n_permutations, seed, rounding),
            "attention": _attention(own.attention, seed),
            "direct": _direct(own.direct, base.direct, places.get(category), seed),
        }
        for place in range(loaded.layout.n_layers * loaded.layout.n_heads):
            layer, head = divmod(place, loaded.layout.n_heads)
            scores.append(
                {"layer": layer, "head": head, "category": category, **{n: c[place] for n, c in columns.items()}}
            )
    return scores


def _attention(values: Tensor, seed: int) -> list[dict[str, Any]]:
    """Of each head, over the prompts in which it can be told."""
    flat = values.flatten(1)
    return mean_intervals(flat[~flat.isnan().all(1)].double().numpy(), seed)


def _direct(own: Tensor, base: Tensor, place: int | None, seed: int) -> list[dict[str, Any]]:
    """Of each head, on the target of one category."""
    if place is None:
        return [{"mean": None, "interval": None, "n": 0, "neutral": None}] * own[0, 0].numel()
    at_neutral = base[:, place].double().mean(0).flatten().tolist()
    found = mean_intervals(own[:, place].flatten(1).double().numpy(), seed)
    return [{**each, "neutral": mean} for each, mean in zip(found, at_neutral, strict=True)]


def _changes(own: Tensor, base: Tensor, n_permutations: int, seed: int, rounding: float) -> list[dict[str, float]]:
    values = torch.cat([own, base]).flatten(1).double().numpy()
    found = differences(values, np.arange(len(values)) < len(own), n_permutations, seed, rounding)
    return [{"change": float(change), "d": float(d), "p": float(p)} for change, d, p in zip(*found, strict=True)]


class _Reading:
    """One forward of each prompt, read for all three scores."""

    def __init__(self, loaded: LoadedModel, targets: Sequence[Target], batch_size: int) -> None:
        self._loaded, self._layout, self._batch_size = loaded, loaded.layout, batch_size
        check_patterns(loaded.model, self._layout)
        self._effects = DirectEffects(loaded, targets) if targets else None
        norms = [Site("head_result_norm", layer) for layer in range(self._layout.n_layers)]
        self._norms = self._layout.pick(norms)
        reach = [window_of(loaded.model), most_columns(loaded.model), loaded.context]
        self._longest = min((each for each in reach if each is not None), default=None)

    def over(self, texts: Sequence[str], words: Sequence[str], progress: Any) -> Measured:
        """Padding changes nothing: it is on the right, where no token looks."""
        pattern = whole_words(words) if words else None
        found: list[Measured] = []
        order: list[int] = []
        for start in range(0, len(texts), self._batch_size):
            batch = [self._encoded(text, pattern) for text in texts[start : start + self._batch_size]]
            groups = apart(self._loaded.model, [Span(len(ids), len(ids)) for ids, _ in batch])
            for some in ([batch[row] for row in group] for group in groups):
                marks = padded([list(map(int, marked)) for _, marked in some]).ids.bool()
                found.append(self._batch(padded([ids for ids, _ in some]), marks))
            order += [start + row for group in groups for row in group]
            progress.update(len(batch))
        place = torch.tensor(order).argsort()
        return Measured(*(torch.cat(column)[place] for column in zip(*found, strict=True)))

    def _encoded(self, text: str, pattern: Any) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are in keywords."""
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

    def _batch(self, batch: Batch, marks: Tensor) -> Measured:
        """marks: [batch, pos]: the tokens of keywords."""
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
        strength = torch.stack([_mean_a_row(recording.rows[key], lengths) for key in self._norms], 1)
        none = strength.new_zeros(len(strength), 1, *strength.shape[1:])
        rows = {key: each[last] for key, each in recording.rows.items()}
        return Measured(strength, attention, self._effects.of(rows) if self._effects else none)


def _mean_a_row(values: Tensor, lengths: Tensor) -> Tensor:
    """values: [real tokens, n_heads], row after row. Returns [batch, n_heads]."""
    return torch.stack([each.float().mean(0) for each in torch.split(values, lengths.tolist())])


def _above_uniform(pattern: Tensor, mask: Tensor, marks: Tensor) -> Tensor:
    """Attention to marked tokens less their part of what is visible: [batch, n_heads], the mean over positions that see both kinds.

    pattern: [batch, n_heads, query_pos, key_pos]. mask: [batch, pos], the real tokens. marks: [batch, pos]. NaN where no position sees both.
    """
    marked = marks.to(pattern.device).float()
    paid = torch.einsum("bhqk,bk->bhq", pattern.float(), marked)
    n_seen = torch.arange(1, marked.shape[1] + 1, device=pattern.device)
    n_marked = marked.cumsum(1)  # [batch, query_pos]
    counts = (n_marked > 0) & (n_marked < n_seen) & mask.to(pattern.device)
    above = (paid - (n_marked / n_seen)[:, None]) * counts[:, None]
    return (above.sum(-1) / counts.sum(-1)[:, None]).cpu()

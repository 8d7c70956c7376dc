"""What each head does in a prompt: how strong it is, what it attends to, and what it adds to the logits of some words."""

from __future__ import annotations

from collections.abc import Sequence
from re import Pattern
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.analysis.parts.direct_effect import DirectEffects
from AutomaticEval.analysis.words.metrics import whole_words
from AutomaticEval.analysis.words.targets import Target, tokens_within
from AutomaticEval.capture.batch_independence import Span, apart
from AutomaticEval.capture.texts.forward import Batch, padded, recorded
from AutomaticEval.capture.tree.suitability import most_columns, window_of
from AutomaticEval.errors import PromptError
from AutomaticEval.models.attention import check_patterns, reading_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site


class HeadMeasures(NamedTuple):
    """What was measured of each head in some prompts."""

    strength: Tensor
    """[n_prompts, n_layers, n_heads]: the mean norm of the head's result over the prompt's tokens."""
    attention: Tensor
    """[n_prompts, n_layers, n_heads]: attention to keywords above uniform; NaN in prompts where it is not defined."""
    direct: Tensor
    """[n_prompts, n_targets, n_layers, n_heads], in logits, at the last token."""


class HeadMeter:
    """Measures all heads in one forward of each prompt.

    targets: may be none. Raises SiteUnavailable for a model without what is read, PromptError for a prompt that is empty or too long.
    """

    def __init__(self, loaded: LoadedModel, targets: Sequence[Target], batch_size: int) -> None:
        self._loaded, self._layout, self._batch_size = loaded, loaded.layout, batch_size
        check_patterns(loaded.model, self._layout)
        self._effects = DirectEffects(loaded, targets) if targets else None
        self._norms = self._layout.pick(Site("head_result_norm", layer) for layer in range(self._layout.n_layers))
        limits = [window_of(loaded.model), most_columns(loaded.model), loaded.context]
        self._longest = min((limit for limit in limits if limit is not None), default=None)

    def measure(self, texts: Sequence[str], words: Sequence[str], progress: Any) -> HeadMeasures:
        """What is measured in each text, in their order. Padding is on the right, where no token looks, so it changes nothing.

        words: the keywords of the texts' category. progress: a bar of tqdm, over texts.
        """
        pattern = whole_words(words) if words else None
        measured: list[HeadMeasures] = []
        order: list[int] = []
        for start in range(0, len(texts), self._batch_size):
            batch = [self._encoded(text, pattern) for text in texts[start : start + self._batch_size]]
            for group in apart(self._loaded.model, [Span(len(ids), len(ids)) for ids, _ in batch]):
                marks = padded([list(map(int, batch[row][1])) for row in group]).ids.bool()
                measured.append(self._batch(padded([batch[row][0] for row in group]), marks))
                order += [start + row for row in group]
            progress.update(len(batch))
        place = torch.tensor(order).argsort()
        return HeadMeasures(*(torch.cat(column)[place] for column in zip(*measured, strict=True)))

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

    def _batch(self, batch: Batch, marks: Tensor) -> HeadMeasures:
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
        return HeadMeasures(strength, attention, direct)


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

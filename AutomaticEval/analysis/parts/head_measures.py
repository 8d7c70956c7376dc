"""What each head does in a prompt: how strong it is, what it attends to, and what it adds to the logits of some words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.analysis.parts.direct_effect import DirectEffects
from AutomaticEval.analysis.words.keywords import Words
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

    norms: list[Tensor]
    """For each prompt [pos, n_layers, n_heads]: the norm of the head's result at each token. Layers are those that have heads."""
    direct: Tensor
    """[n_prompts, n_targets, n_layers, n_heads], in logits, at the last token."""


class Prompt(NamedTuple):
    """A prompt's tokens."""

    ids: list[int]
    marks: list[bool]
    """For each token whether it is part of a keyword."""


Listener = Callable[[int, int, Any], None]
"""Is told the pattern of each prompt and layer: (number of the prompt, number of the layer among those with heads, [n_heads, query_pos, key_pos] as an
array)."""


class HeadMeter:
    """Measures all heads in one forward of each prompt, in the layers that have heads.

    targets: may be none. Raises SiteUnavailable for a model without what is read, PromptError for a prompt that is empty or too long.
    """

    def __init__(self, loaded: LoadedModel, targets: Sequence[Target], batch_size: int) -> None:
        self._loaded, self._layout, self._batch_size = loaded, loaded.layout, batch_size
        check_patterns(loaded.model, self._layout)
        self._effects = DirectEffects(loaded, targets) if targets else None
        self.layers = self._layout.layers_of("z")
        """The layers that have heads."""
        self._norms = self._layout.pick(Site("head_result_norm", layer) for layer in self.layers)

    def measure(self, prompts: Sequence[Prompt], listeners: Sequence[Listener], progress: Any) -> HeadMeasures:
        """What is measured in each prompt, in their order. Padding is on the right, where no token looks, so it changes nothing.

        listeners: are told all patterns. progress: a bar of tqdm, over prompts.
        """
        norms: dict[int, Tensor] = {}
        direct: dict[int, Tensor] = {}
        for start in range(0, len(prompts), self._batch_size):
            batch = [each.ids for each in prompts[start : start + self._batch_size]]
            for group in apart(self._loaded.model, [Span(len(ids), len(ids)) for ids in batch]):
                rows = [start + row for row in group]
                found = self._batch(padded([batch[row] for row in group]), rows, listeners)
                norms |= zip(rows, found.norms, strict=True)
                direct |= zip(rows, found.direct, strict=True)
            progress.update(len(batch))
        every = range(len(prompts))
        return HeadMeasures([norms[row] for row in every], torch.stack([direct[row] for row in every]))

    def _batch(self, batch: Batch, numbers: Sequence[int], listeners: Sequence[Listener]) -> HeadMeasures:
        """What is measured in one batch. numbers: which of the prompts its rows are."""
        loaded, layout = self._loaded, self._layout
        keep = Kept(*batch.mask.nonzero(as_tuple=True))
        taps = {**self._norms, **(self._effects.taps if self._effects else {})}
        lengths = batch.mask.sum(1)
        with reading_patterns(loaded.model, layout) as patterns:
            recording = recorded(loaded.model, layout, {**taps, "after": patterns.after}, batch, keep)
            for place, layer in enumerate(self.layers):
                of_layer = patterns.of(layer, batch.mask).float().cpu().numpy()
                for row, (number, length) in enumerate(zip(numbers, lengths.tolist(), strict=True)):
                    for listener in listeners:
                        listener(number, place, of_layer[row, :, :length, :length])
        last = lengths.cumsum(0) - 1
        norms = torch.stack([recording.rows[key].float() for key in self._norms], 1)  # [real tokens, n_layers, n_heads]
        if self._effects is None:
            direct = norms.new_zeros(len(lengths), 1, *norms.shape[1:])
        else:
            direct = self._effects.of({key: rows[last] for key, rows in recording.rows.items()})
        return HeadMeasures(list(torch.split(norms, lengths.tolist())), direct)


def encoded(loaded: LoadedModel, texts: Sequence[str], words: Sequence[str]) -> list[Prompt]:
    """The tokens of each text. words: the keywords that are marked; may be none.

    Raises PromptError for a text that is empty, or longer than its last token sees.
    """
    limits = [window_of(loaded.model), most_columns(loaded.model), loaded.context]
    longest = min((limit for limit in limits if limit is not None), default=None)
    return [_encoded(loaded.tokenizer, text, Words(words) if words else None, longest) for text in texts]


def _encoded(tokenizer: Any, text: str, words: Words | None, longest: int | None) -> Prompt:
    if words is None:
        ids = tokenizer(text)["input_ids"]
        marks = [False] * len(ids)
    else:
        ids, marks = tokens_within(tokenizer, text, words)
    if not ids or (longest is not None and len(ids) > longest):
        raise PromptError(
            f"a prompt of {len(ids)} tokens cannot be screened: 1 to {longest} can, for all of it must be seen by its last "
            f"token. It begins {text[:40]!r}."
        )
    return Prompt(ids, marks)

"""The tokens with which all prompts of a batch begin, computed once and kept for the next batch.

Each forward computes one whole chunk of tokens, so that keys and values do not depend on which batch came first. Does not know how the
rest of the prompts is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from AutomaticEval.capture.keeping import BatchRow, keep_columns, recording_of, sequence_rows
from AutomaticEval.capture.padding_probes import is_tested
from AutomaticEval.capture.tree.prefix_tree import n_shared
from AutomaticEval.capture.tree.suitability import check_scores, why_not
from AutomaticEval.capture.tree.walk import Cached, tree_forward
from AutomaticEval.models.architecture.forward_call import alone_with, input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.samples import Part, Rows
from AutomaticEval.selection import Selection

PLAIN = frozenset(
    [
        "attention_mask",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "no_repeat_ngram_size",
    ]
)
"""The settings that transformers' `generate` may be given: they look at logits and tokens only."""
ONE_PASS = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": None,
    "prompt_lookup_num_tokens": None,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "prefill_chunk_size": None,
}
"""The values that a checkpoint's own generation config must have, where it has any."""
CHUNK = 64
"""Tokens that are prefilled by one forward. Shared tokens beyond whole chunks are computed with each prompt."""


@dataclass(frozen=True)
class Prefix:
    """The tokens with which every prompt of a batch begins."""

    n_tokens: int
    cached: Cached
    rows: Sequence[Rows]
    """The kept rows of each chunk; empty when no row of them is kept."""

    def cache(self, n_rows: int) -> DynamicCache:
        """The keys and values, for a batch of n_rows rows."""
        layers: list[Any] = [
            (_spread(keys, self.n_tokens, n_rows), _spread(values, self.n_tokens, n_rows))
            for keys, values in self.cached
        ]
        return DynamicCache(layers)

    def arranged(self, batch: Tensor, pads: Sequence[int]) -> Tensor:
        """A batch [n_rows, columns] with each row rearranged: from padding, prompt to prefix, padding, rest of the prompt."""
        end = self.n_tokens
        rows = [
            torch.cat([row[pad : pad + end], row[:pad], row[pad + end :]]) for row, pad in zip(batch, pads, strict=True)
        ]
        return torch.stack(rows)

    def parts(self, positions: Sequence[int]) -> list[Part]:
        """Where the rows of those positions are that belong to the prefix."""
        parts = []
        for number, rows in enumerate(self.rows):
            where = [position % CHUNK for position in positions if position // CHUNK == number]
            if where:
                parts.append(Part(rows, where))
        return parts


@dataclass
class Prefill:
    """Computes prefixes, and keeps the last one. Call `forget` when the model may change."""

    loaded: LoadedModel
    selection: Selection | None
    n_computed: int = 0
    """Tokens that were fed."""

    _ids: list[int] = field(default_factory=list)
    _cached: Cached = field(default_factory=list)
    _rows: list[Rows] = field(default_factory=list)
    _is_checked: bool = False

    def suits(self, max_length: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether the model generates the same text from a prefix that was computed before, with padding between prefix and rest of a prompt.

        max_length: the columns of the batch with its responses. kwargs: the settings for transformers' `generate`.
        """
        model = self.loaded.model
        own = model.generation_config
        is_plain = set(kwargs) <= PLAIN and all(
            getattr(own, name, None) in (None, value) for name, value in ONE_PASS.items()
        )
        return is_plain and is_tested(model) and why_not(model, max_length) is None

    def of(self, prompts: Sequence[Sequence[int]], most: int) -> Prefix | None:
        """The prefix of all prompts, in whole chunks; None when they share no whole chunk.

        most: the most tokens of the prefix. For a single prompt, these are the tokens that it shares with later prompts.
        Raises TreeUnsuitable when a plain forward gives other scores.
        """
        shortest = min(prompts, key=len)
        n_alike = min(most, len(shortest) - 1, *(n_shared(shortest, prompt) for prompt in prompts))
        n_tokens = n_alike // CHUNK * CHUNK
        if n_tokens <= 0:
            return None
        ids = list(shortest[:n_tokens])
        keeps = self.selection is not None and any(
            self.selection.positions.window(len(prompt))[0] < n_tokens for prompt in prompts
        )
        n_kept = n_shared(self._ids, ids) // CHUNK * CHUNK
        self._go_back(n_kept if bool(self._rows) == keeps else 0)
        for start in range(len(self._ids), n_tokens, CHUNK):
            self._extend(ids[start : start + CHUNK], keeps=keeps)
        return Prefix(n_tokens, self._cached, tuple(self._rows))

    def forget(self) -> None:
        """Free the keys, values and rows. The next prefix is computed and checked anew."""
        self._ids, self._rows, self._cached, self._is_checked = [], [], [], False

    def _go_back(self, n_tokens: int) -> None:
        """Forget all but the first n_tokens tokens."""
        self._ids, self._rows = self._ids[:n_tokens], self._rows[: n_tokens // CHUNK]
        self._cached = [(_first(keys, n_tokens), _first(values, n_tokens)) for keys, values in self._cached]

    def _extend(self, ids: list[int], *, keeps: bool) -> None:
        """Compute the next chunk. The first chunk is compared with a plain forward."""
        model, n_past = self.loaded.model, len(self._ids)
        positions = range(n_past, n_past + CHUNK)
        device = input_device(model)
        depths = torch.arange(n_past, n_past + CHUNK, device=device)
        mask = torch.arange(n_past + CHUNK, device=device) <= depths[:, None]
        recorder = recording_of(self.loaded, self.selection, keep_columns([range(CHUNK)]) if keeps else None, 1)
        with torch.no_grad(), alone_with(model), recorder as recording:
            fed, last = torch.tensor(ids, device=device), depths[-1:] - n_past
            logits, self._cached = tree_forward(model, fed, depths, mask, self._cached, last)
        self._ids = [*self._ids, *ids]
        self.n_computed += CHUNK
        if not self._is_checked:
            best = torch.log_softmax(logits[0, -1].float(), -1).cpu().max(-1)
            check_scores(model, self._ids, [int(best.indices)], best.values[None])
            self._is_checked = True
        if recording is not None:
            at = BatchRow(0, n_past=n_past)
            sequence = [*self._ids, -1]  # the last token of a sequence is never fed
            (rows,) = sequence_rows(recording, at, sequence, positions, self.loaded.tokenizer)
            self._rows.append(rows)


def _first(cached: Tensor | None, n_tokens: int) -> Tensor | None:
    """The keys or values [1, n_kv_heads, n_cached, d_head] of the first tokens; None for a layer that uses those of another."""
    return None if cached is None else cached[:, :, :n_tokens]


def _spread(cached: Tensor | None, n_tokens: int, n_rows: int) -> Tensor | None:
    """The keys or values of the first tokens for each row of a batch: [n_rows, n_kv_heads, n_tokens, d_head]."""
    first = _first(cached, n_tokens)
    return None if first is None else first.expand(n_rows, -1, -1, -1)

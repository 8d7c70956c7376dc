"""What the prompts of a batch begin with together, computed once and kept for the next batch.

Keys and values are made in whole chunks, each forward of one chunk, so that they do not depend on which batch came first. Knows
nothing of how the rest is generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from AutomaticEval.capture.batch_independence import is_tested
from AutomaticEval.capture.generation import recording_of, sequence_rows
from AutomaticEval.capture.tree.prefix_tree import n_shared
from AutomaticEval.capture.tree.suitability import check_scores, why_not
from AutomaticEval.capture.tree.walk import Cached, keep_columns, tree_forward
from AutomaticEval.models.architecture.forward_call import alone_with
from AutomaticEval.models.loading import LoadedModel
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
"""What transformers' generate may be given besides: all of it looks at logits and tokens alone."""
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
"""What a checkpoint's own generation config must say, where it says anything."""
CHUNK = 64
"""Tokens that are prefilled together; what prompts share beyond whole chunks is computed with each of them."""


@dataclass(frozen=True)
class Prefix:
    """The beginning of every prompt of a batch."""

    n_tokens: int
    cached: Cached
    rows: Sequence[Rows]
    """One for each chunk; none when nothing of them is kept."""

    def cache(self, n_rows: int) -> DynamicCache:
        """Keys and values for a batch of so many rows."""
        spread = [
            tuple(each if each is None else each[:, :, : self.n_tokens].expand(n_rows, -1, -1, -1) for each in layer)
            for layer in self.cached
        ]
        return DynamicCache(spread)

    def arranged(self, batch: Tensor, pads: Sequence[int]) -> Tensor:
        """[padding, prompt] of each row of a batch [n_rows, columns] as [prefix, padding, rest of the prompt]."""
        end = self.n_tokens
        rows = [
            torch.cat([row[pad : pad + end], row[:pad], row[pad + end :]]) for row, pad in zip(batch, pads, strict=True)
        ]
        return torch.stack(rows)

    def parts(self, positions: Sequence[int]) -> list[Part]:
        """Where the rows of these positions are, as far as they are in the prefix."""
        found = []
        for number, rows in enumerate(self.rows):
            where = [position % CHUNK for position in positions if position // CHUNK == number]
            if where:
                found.append(Part(rows, where))
        return found


@dataclass
class Prefill:
    """The prefix that was computed last; `forget` it when the model may change."""

    loaded: LoadedModel
    selection: Selection | None
    n_computed: int = 0
    """Tokens that were fed."""

    _ids: list[int] = field(default_factory=list)
    _cached: Cached = field(default_factory=list)
    _rows: list[Rows] = field(default_factory=list)
    _is_checked: bool = False

    def suits(self, max_length: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether the model generates the same text after a prefix that was computed before, with padding between the prefix and the rest of a prompt.

        max_length: columns of the batch with its answers. kwargs: for transformers' generate.
        """
        model = self.loaded.model
        own = model.generation_config
        is_plain = set(kwargs) <= PLAIN and all(
            getattr(own, name, None) in (None, value) for name, value in ONE_PASS.items()
        )
        return is_plain and is_tested(model) and why_not(model, max_length) is None

    def of(self, prompts: Sequence[Sequence[int]], most: int) -> Prefix | None:
        """Computes what all prompts begin with, in whole chunks. None when they share no whole chunk.

        most: at most so many tokens, such as those that a single prompt shares with prompts to come.
        Raises TreeUnsuitable when a plain forward gives something else.
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
        """Free what was computed; the next prefix is computed, and checked, anew."""
        self._ids, self._rows, self._cached, self._is_checked = [], [], [], False

    def _go_back(self, n_tokens: int) -> None:
        """Forget what comes after the first so many tokens."""
        self._ids, self._rows = self._ids[:n_tokens], self._rows[: n_tokens // CHUNK]
        self._cached = [
            (keys if keys is None else keys[:, :, :n_tokens], values if values is None else values[:, :, :n_tokens])
            for keys, values in self._cached
        ]

    def _extend(self, ids: list[int], *, keeps: bool) -> None:
        """Compute the next chunk, and compare the first with a plain forward."""
        model, n_past = self.loaded.model, len(self._ids)
        attended = np.concatenate([np.ones((CHUNK, n_past), dtype=bool), np.tri(CHUNK, dtype=bool)], axis=1)
        depths = np.arange(n_past, n_past + CHUNK)
        recorder = recording_of(self.loaded, self.selection, keep_columns(np.arange(CHUNK)) if keeps else None, 1)
        with torch.no_grad(), alone_with(model), recorder as recording:
            logits, self._cached = tree_forward(
                model, np.array(ids), depths, attended, self._cached, np.array([CHUNK - 1])
            )
        self._ids = [*self._ids, *ids]
        self.n_computed += CHUNK
        if not self._is_checked:
            best = torch.log_softmax(logits[0, -1].float(), -1).cpu().max(-1)
            check_scores(model, self._ids, [int(best.indices)], best.values[None])
            self._is_checked = True
        if recording is not None:
            begun = [*self._ids, -1]  # what comes next is not fed
            self._rows.append(sequence_rows(recording, 0, 0, begun, depths.tolist(), self.loaded.tokenizer, n_past))

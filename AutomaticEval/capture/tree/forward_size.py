"""How many tokens a forward over a prefix tree should have, by trying."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from AutomaticEval.capture.tree.prefix_tree import Array
from AutomaticEval.capture.tree.suitability import most_columns
from AutomaticEval.capture.tree.walk import Cached, free_memory, is_out_of_memory, tree_forward
from AutomaticEval.models.architecture.forward_call import alone_with
from AutomaticEval.models.loading import LoadedModel

CHOICES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens a forward that are tried."""
GAIN = 1.05
"""How much faster twice the tokens must be to be worth their memory."""


def measured_tokens(loaded: LoadedModel, n_past: int) -> int:
    """How many tokens a forward should have: the fewest with which they are computed about as fast as can be.

    n_past: how many the path before a stretch usually has. Tries made-up tokens, until twice as many are no faster or do not
    fit into memory.
    """
    best, best_speed = CHOICES[0], 0.0
    cached: Cached = []
    none = np.empty(0, np.int64)
    with torch.no_grad(), alone_with(loaded.model):
        if n_past:
            _, cached = tree_forward(
                loaded.model, np.ones(n_past, np.int64), np.arange(n_past), np.tri(n_past, dtype=bool), [], none
            )
        limit = most_columns(loaded.model) or 2**62
        for n_tokens in CHOICES:
            if n_past + n_tokens > limit:
                break
            ids, depths = np.ones(n_tokens, np.int64), np.full(n_tokens, n_past)
            attended = np.concatenate([np.ones((n_tokens, n_past), dtype=bool), np.eye(n_tokens, dtype=bool)], axis=1)
            try:
                seconds = min(_timed(loaded.model, ids, depths, attended, cached) for _ in range(2))
            except RuntimeError as failure:
                if not is_out_of_memory(failure):
                    raise
                break
            if n_tokens / seconds < best_speed * GAIN:
                break
            best, best_speed = n_tokens, n_tokens / seconds
    free_memory()
    return best


def _timed(model: Any, token_ids: Array, depths: Array, attended: Array, cached: Cached) -> float:
    """Seconds of one forward."""
    started = time.perf_counter()
    logits, _ = tree_forward(model, token_ids, depths, attended, cached, np.arange(1))
    logits.sum().item()  # waits for the device
    return time.perf_counter() - started

"""How many tokens a forward over a prefix tree should have, found by trying."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch

from AutomaticEval.capture.memory import free_memory, unless_too_large
from AutomaticEval.capture.tree.prefix_tree import Array
from AutomaticEval.capture.tree.suitability import most_columns
from AutomaticEval.capture.tree.walk import Cached, tree_forward
from AutomaticEval.models.architecture.forward_call import alone_with
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

CHOICES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The numbers of tokens that are tried."""
GAIN = 1.05
"""How much faster twice the tokens must be to be worth their memory."""


def measured_tokens(loaded: LoadedModel, n_past: int) -> int:
    """How many tokens a forward should have: the fewest at which about as many tokens a second are computed as at any number.

    n_past: how many tokens usually come before a stretch on its path. Made-up tokens are tried, until twice as many are no faster or
    do not fit into memory.
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
            seconds = unless_too_large(partial(_quicker_of_two, loaded.model, ids, depths, attended, cached))
            if seconds is None or n_tokens / seconds < best_speed * GAIN:
                break
            best, best_speed = n_tokens, n_tokens / seconds
    free_memory()
    return best


def _quicker_of_two(model: Any, token_ids: Array, depths: Array, attended: Array, cached: Cached) -> float:
    """The seconds of the quicker of two forwards: the first one may have to set something up."""
    return min(_timed(model, token_ids, depths, attended, cached) for _ in range(2))


def _timed(model: Any, token_ids: Array, depths: Array, attended: Array, cached: Cached) -> float:
    """The seconds of one forward."""
    started = time.perf_counter()
    logits, _ = tree_forward(model, token_ids, depths, attended, cached, np.arange(1))
    logits.sum().item()  # waits until the device has computed it
    return time.perf_counter() - started

"""How many tokens a forward over a prefix tree should have, found by trying."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.capture.memory import free_memory, unless_too_large
from AutomaticEval.capture.tree.suitability import most_columns
from AutomaticEval.capture.tree.walk import Cached, tree_forward
from AutomaticEval.models.architecture.forward_call import alone_with, input_device
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
    device = input_device(loaded.model)
    with torch.no_grad(), alone_with(loaded.model):
        if n_past:
            depths = torch.arange(n_past, device=device)
            _, cached = tree_forward(loaded.model, depths * 0 + 1, depths, depths <= depths[:, None], [], depths[:0])
        limit = most_columns(loaded.model) or 2**62
        for n_tokens in CHOICES:
            if n_past + n_tokens > limit:
                break
            columns = torch.arange(n_past + n_tokens, device=device)
            own = columns[n_past:]
            ids, depths = torch.ones_like(own), torch.full_like(own, n_past)
            mask = (columns < n_past) | (columns == own[:, None])
            seconds = unless_too_large(partial(_quicker_of_two, loaded.model, ids, depths, mask, cached))
            if seconds is None or n_tokens / seconds < best_speed * GAIN:
                break
            best, best_speed = n_tokens, n_tokens / seconds
    free_memory()
    return best


def _quicker_of_two(model: Any, token_ids: Tensor, depths: Tensor, mask: Tensor, cached: Cached) -> float:
    """The seconds of the quicker of two forwards: the first one may have to set something up."""
    return min(_timed(model, token_ids, depths, mask, cached) for _ in range(2))


def _timed(model: Any, token_ids: Tensor, depths: Tensor, mask: Tensor, cached: Cached) -> float:
    """The seconds of one forward."""
    started = time.perf_counter()
    logits, _ = tree_forward(model, token_ids, depths, mask, cached, torch.arange(1, device=token_ids.device))
    logits.sum().item()  # waits until the device has computed it
    return time.perf_counter() - started

"""`decoding`: what callers put around a model's `generate`, whichever way the decode steps go.

Does not decide the way (`way.py`), and does not know where prompts come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from AutomaticEval.capture.graph import kept_steps
from AutomaticEval.capture.graph.from_graph import GraphBatch, from_graph
from AutomaticEval.capture.graph.way import Way
from AutomaticEval.capture.memory import unless_too_large
from AutomaticEval.capture.tree.shared_prompt import Prefix
from AutomaticEval.models.recording import Recording

T = TypeVar("T")


def decoding(
    model: Any, way: Way, shape: tuple[int, int], recording: Recording | None = None, prefix: Prefix | None = None
) -> AbstractContextManager[Mapping[str, Any]]:
    """Inside, the model's `generate` goes a way. What this yields are further arguments for it, which go before others of the same names.

    shape: rows and columns of the batch with its longest answers, padding among them. recording: what captures the batch; None captures
    nothing. prefix: what the prompts begin with, computed before; when the way is eager, it is the caller who hands its keys and values to
    `generate`.
    """
    if way.kind == "eager":
        return nullcontext({})
    return from_graph(model, GraphBatch(*shape, recording, prefix))


def again_without_graphs(compute: Callable[[], T], way: Way) -> T:
    """What `compute` gives. When it does not fit into memory beside the graphs that are kept, they are dropped, and it is computed again from the
    same random state."""
    if way.kind == "eager" or not kept_steps.are_any():
        return compute()
    before = _random_state()
    found = unless_too_large(lambda: [compute()])  # in a list, because None means that it did not fit
    if found is None:
        _set_random_state(before)
        return compute()
    return found[0]


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """torch's random state on the CPU, and on each GPU that is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])

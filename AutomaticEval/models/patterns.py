"""`reading_patterns`: attention after softmax, which a model computes only with eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.taps import Layout, alone_with
from AutomaticEval.sites import Site

SUM_IS_ONE = 0.01
"""How far the attention that a position pays may be from 1 in all: of bfloat16, many small numbers."""


@contextmanager
def reading_patterns(model: Any, layout: Layout) -> Iterator[dict[int, Tensor]]:
    """Layer -> the pattern of the last forward inside the with: [batch, n_heads, query_pos, key_pos], in the model's dtype.

    The model attends eagerly inside, and as it did before afterwards: scores differ by rounding, and memory grows with the square of the
    length. Raises SiteUnavailable for a model without such attention, or whose positions do not pay 1 in all to themselves and what is
    before them (padding on the right is allowed, on the left not).
    """
    found: dict[int, Tensor] = {}
    with ExitStack() as undo:
        undo.enter_context(alone_with(model))
        undo.enter_context(_eager(model))
        for layer in range(layout.n_layers):
            path = layout.pick([Site("z", layer)])[f"layer_{layer}.z"].module
            block = layout.taps[Site("resid_pre", layer)].module
            for parent in _parents(path, block):
                hook = _hook(found, layer, layout.n_heads)
                undo.callback(model.get_submodule(parent).register_forward_hook(hook).remove)
        undo.callback(model.register_forward_pre_hook(lambda *_: found.clear()).remove)
        undo.callback(model.register_forward_hook(lambda *_: _check(found, layout.n_layers)).remove)
        yield found


def _parents(path: str, block: str) -> list[str]:
    """The modules between an output projection and its block, innermost first: one of them is the attention."""
    found = []
    while (path := path.rpartition(".")[0]) != block:
        found.append(path)
    return found


def _hook(found: dict[int, Tensor], layer: int, n_heads: int) -> Any:
    def after(module: nn.Module, args: Any, output: Any) -> None:
        for each in output[1:] if isinstance(output, tuple) else ():
            if isinstance(each, Tensor) and each.dim() == 4 and each.shape[1] == n_heads:
                found[layer] = each.detach()
                return

    return after


def _check(found: dict[int, Tensor], n_layers: int) -> None:
    for layer in range(n_layers):
        if layer not in found:
            raise SiteUnavailable(f"this model has no 'pattern': the attention of block {layer} gives no weights.")
        pattern = found[layer]
        off = (pattern.float().sum(-1) - 1).abs().max().item()
        later = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device).triu(1)
        ahead = pattern.masked_fill(~later, 0).abs().max().item()
        if not (off <= SUM_IS_ONE and ahead == 0):  # nan is off, too
            raise SiteUnavailable(
                f"what the attention of block {layer} gives is no pattern: a position pays {1 + off:.3g} in all, and {ahead:.3g} "
                "to one that comes after it; 1 and 0 were expected."
            )


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    if before == "eager":
        yield
        return
    try:
        base.set_attn_implementation("eager")
    except ValueError as failure:
        raise SiteUnavailable(
            f"this model has no 'pattern': {type(base).__name__} cannot attend eagerly ({failure})."
        ) from None
    try:
        yield
    finally:
        base.set_attn_implementation(before)

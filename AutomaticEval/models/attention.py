"""`reading_patterns`: attention after softmax, which a model computes only with eager attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.architecture.forward_call import alone_with, few_ids
from AutomaticEval.models.architecture.identities import PROBE_LENGTH
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.sites import Site

SUM_IS_ONE = 0.01
"""How far the attention that a position pays may be from 1 in all: of bfloat16, many small numbers."""


class Patterns:
    """What the attention of some layers gave in the last forward."""

    def __init__(self, n_heads: int, after: Tap) -> None:
        self._n_heads = n_heads
        self.after = after
        """A tap behind the deepest pattern that is read, of a narrow site. A forward that stops once all its taps are read then does not stop before that pattern."""
        self._found: dict[int, Tensor] = {}

    def of(self, layer: int, mask: Tensor | None = None) -> Tensor:
        """[batch, n_heads, query_pos, key_pos], in the model's dtype.

        mask: [batch, pos], the tokens that are no padding, which is on the right; None: all.
        Raises SiteUnavailable for a model without such attention, or whose tokens do not pay 1 in all to themselves and what is before them.
        """
        if layer not in self._found:
            raise SiteUnavailable(f"this model has no 'pattern': the attention of block {layer} gives no weights.")
        pattern = self._found[layer]
        later = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device).triu(1)
        paid, ahead_of = pattern.float().sum(-1), pattern.masked_fill(~later, 0).abs().amax(-1)
        real = (
            slice(None) if mask is None else mask.to(pattern.device)
        )  # beyond a window, padding may attend to anything
        paid, ahead_of = (each.transpose(1, 2)[real].flatten() for each in (paid, ahead_of))
        worst, ahead = paid[(paid - 1).abs().argmax()].item(), ahead_of.max().item()
        if not (abs(worst - 1) <= SUM_IS_ONE and ahead == 0):  # nan is off, too
            raise SiteUnavailable(
                f"what the attention of block {layer} gives is no pattern: a position pays {worst:.3g} in all (less where some goes to a "
                f"sink), and {ahead:.3g} to one that comes after it; 1 and 0 were expected."
            )
        return pattern

    def forget(self, *_: Any) -> None:
        """A forward begins."""
        self._found.clear()

    def hook(self, layer: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            for each in output[1:] if isinstance(output, tuple) else ():
                if isinstance(each, Tensor) and each.dim() == 4 and each.shape[1] == self._n_heads:
                    self._found[layer] = each.detach()
                    return

        return after


@contextmanager
def reading_patterns(model: Any, layout: Layout, layers: Iterable[int] | None = None) -> Iterator[Patterns]:
    """The patterns of some layers, by default of all.

    The model attends eagerly inside, and as it did before afterwards: scores differ by rounding, and memory grows with the square of the
    length. Raises SiteUnavailable for a model that cannot.
    """
    layers = list(range(layout.n_layers) if layers is None else layers)
    deepest = Site("resid_post", max(layers))
    found = Patterns(layout.n_heads, replace(layout.pick([deepest])[deepest.key], columns=()))
    with alone_with(model), _eager(model), Hooks() as hooks:
        for layer in layers:
            path = layout.pick([Site("z", layer)])[f"layer_{layer}.z"].module
            block = layout.taps[Site("resid_pre", layer)].module
            for parent in _parents(path, block):
                hooks.after(model.get_submodule(parent), found.hook(layer))
        hooks.before(model.get_submodule(layout.whole), found.forget)
        yield found


def check_patterns(model: Any, layout: Layout) -> None:
    """Raises SiteUnavailable when the values, as patterns weigh them, are not z: then a head's pattern is not what the head reads.

    It is not checked in layers whose values are not found.
    """
    layers = [layer for layer in range(layout.n_layers) if {Site("v", layer), Site("z", layer)} <= layout.taps.keys()]
    taps = layout.pick(Site(kind, layer) for layer in layers for kind in "vz")
    ids = few_ids(model, PROBE_LENGTH)
    kept = Kept(torch.zeros(PROBE_LENGTH, dtype=torch.long), torch.arange(PROBE_LENGTH))
    with torch.no_grad(), reading_patterns(model, layout) as patterns:
        with capturing(model, taps, layout.embedding, lambda *_: kept, 1) as found:
            model(input_ids=ids)
        for layer in layers:
            v, z = (found.rows[Site(kind, layer).key].float() for kind in "vz")
            each = v.view(PROBE_LENGTH, layout.n_kv_heads, -1).repeat_interleave(layout.n_heads // layout.n_kv_heads, 1)
            weighed = torch.einsum("hqk,khd->qhd", patterns.of(layer)[0].float().cpu(), each).flatten(1)
            off, size = (weighed - z).abs().max().item(), z.abs().max().item()
            if not off <= max(1e-3, 8 * torch.finfo(model.dtype).eps) * (size + 1e-6):  # nan is off, too
                raise SiteUnavailable(
                    f"the pattern of block {layer} is not what its heads read: values weighed by it are {off:.2g} from z, which is {size:.2g}."
                )


def _parents(path: str, block: str) -> list[str]:
    """The modules between an output projection and its block, innermost first: one of them is the attention."""
    found = []
    while (path := path.rpartition(".")[0]) != block:
        found.append(path)
    return found


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    base = inner(model)
    before = base.config._attn_implementation
    if before == "eager":
        yield
        return
    try:
        try:
            base.set_attn_implementation("eager")
        except ValueError as failure:
            raise SiteUnavailable(
                f"this model has no 'pattern': {type(base).__name__} cannot attend eagerly ({failure})."
            ) from None
        yield
    finally:
        if base.config._attn_implementation != before:
            base.set_attn_implementation(before)

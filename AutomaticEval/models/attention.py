"""`reading_patterns`: attention after softmax. A model gives it only with eager attention."""

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
from AutomaticEval.models.described.plain_module import refuse_plain
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.models.refused.unsuited import refuse_virtual
from AutomaticEval.sites import Site

SUM_IS_ONE = 0.01
"""How far the attention that a position pays may be from 1 in all. In bfloat16 it is a sum of many rounded numbers."""


class Patterns:
    """The patterns of some layers in the last forward."""

    def __init__(self, n_heads: int, after: Tap) -> None:
        self._n_heads = n_heads
        self.after = after
        """A tap that takes no numbers, behind the deepest pattern. Read it, too, in a forward that stops as soon as all taps are read, so
        that it does not stop before that pattern."""
        self._by_layer: dict[int, Tensor] = {}

    def of(self, layer: int, mask: Tensor | None = None) -> Tensor:
        """The pattern of a layer: [batch, n_heads, query_pos, key_pos], in the model's dtype.

        mask: [batch, pos], true for the tokens, which are no padding; padding is on the right. None: all are tokens.
        Raises SiteUnavailable for a model whose attention gives no weights, and when the weights of a token do not sum to 1, or reach a
        later position.
        """
        if layer not in self._by_layer:
            raise SiteUnavailable(f"this model has no 'pattern': the attention of block {layer} gives no weights.")
        pattern = self._by_layer[layer]
        is_later = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device).triu(
            1
        )  # [query_pos, key_pos]
        paid, ahead = (
            pattern.float().sum(-1),
            pattern.masked_fill(~is_later, 0).abs().amax(-1),
        )  # [batch, n_heads, query_pos]
        # padding beyond a window may attend to anything, so that it is left out
        tokens = slice(None) if mask is None else mask.to(pattern.device)
        paid, ahead = (each.transpose(1, 2)[tokens].flatten() for each in (paid, ahead))
        worst, most_ahead = paid[(paid - 1).abs().argmax()].item(), ahead.max().item()
        if not (abs(worst - 1) <= SUM_IS_ONE and most_ahead == 0):  # false for NaN, too
            raise SiteUnavailable(
                f"what the attention of block {layer} gives is no pattern: a position pays {worst:.3g} in all (less where some goes to a "
                f"sink), and {most_ahead:.3g} to one that comes after it; 1 and 0 were expected."
            )
        return pattern

    def forget(self, *_: Any) -> None:
        """A forward begins: forget the patterns of the last one."""
        self._by_layer.clear()

    def hook(self, layer: int) -> Any:
        """A forward hook for the modules that may be the attention of a layer: it keeps the weights among their outputs."""

        def after(module: nn.Module, args: Any, output: Any) -> None:
            for each in output[1:] if isinstance(output, tuple) else ():
                if isinstance(each, Tensor) and each.dim() == 4 and each.shape[1] == self._n_heads:
                    self._by_layer[layer] = each.detach()
                    return

        return after


@contextmanager
def reading_patterns(model: Any, layout: Layout, layers: Iterable[int] | None = None) -> Iterator[Patterns]:
    """Read the patterns of some layers, by default of all that have heads, in every forward inside the with.

    Inside, the model attends eagerly, so that scores differ by rounding and memory grows with the square of the length. Afterwards it attends
    as before. Raises SiteUnavailable for a model that cannot attend eagerly, or that has no z in one of the layers.
    """
    refuse_virtual(model, "'pattern'")
    layers = list(layout.layers_of("z") if layers is None else layers)
    deepest = Site("resid_post", max(layers))
    patterns = Patterns(layout.n_heads, replace(layout.pick([deepest])[deepest.key], columns=()))
    with alone_with(model), _eager(model), Hooks() as hooks:
        for layer in layers:
            z = Site("z", layer)
            projection = layout.pick([z])[z.key].module
            block = layout.pick([Site("resid_pre", layer)])[Site("resid_pre", layer).key].module
            for module in _modules_between(projection, block):
                hooks.after(model.get_submodule(module), patterns.hook(layer))
        hooks.before(model.get_submodule(layout.whole), patterns.forget)
        yield patterns


def check_patterns(model: Any, layout: Layout) -> None:
    """Check on a small forward that a head's pattern says what the head reads: v, weighed by the pattern, is z.

    A gate may stand between the two, which multiplies each number by one between 0 and 1 (Qwen3-Next): z then lies between 0 and what is read. Layers without v or z in the layout are not checked. Raises SiteUnavailable.
    """
    layers = [layer for layer in range(layout.n_layers) if {Site("v", layer), Site("z", layer)} <= layout.taps.keys()]
    taps = layout.pick(Site(kind, layer) for layer in layers for kind in "vz")
    ids = few_ids(model, PROBE_LENGTH)
    kept = Kept(torch.zeros(PROBE_LENGTH, dtype=torch.long), torch.arange(PROBE_LENGTH))
    with torch.no_grad(), reading_patterns(model, layout) as patterns:
        with capturing(model, taps, layout.embedding, lambda *_: kept, 1) as recording:
            model(input_ids=ids)
        for layer in layers:
            v, z = (recording.rows[Site(kind, layer).key].float() for kind in "vz")
            n = layout.heads_at(Site("v", layer))
            each = v.view(PROBE_LENGTH, n, -1).repeat_interleave(layout.n_heads // n, 1)
            weighed = torch.einsum("hqk,khd->qhd", patterns.of(layer)[0].float().cpu(), each).flatten(1)
            off, size = (weighed - z).abs().max().item(), z.abs().max().item()
            slack = max(1e-3, 8 * torch.finfo(model.dtype).eps) * (size + 1e-6)
            beyond = torch.maximum(z - weighed.clamp(min=0), weighed.clamp(max=0) - z).max().item()
            if not (off <= slack or beyond <= slack):  # true for NaN, too
                raise SiteUnavailable(
                    f"the pattern of block {layer} is not what its heads read: values weighed by it are {off:.2g} from z, which is {size:.2g}."
                )


def _modules_between(projection: str, block: str) -> list[str]:
    """The paths of the modules that hold an output projection, from it outwards to its block, which is left out. One is the attention."""
    paths = []
    while (projection := projection.rpartition(".")[0]) != block:
        paths.append(projection)
    return paths


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Have a model attend eagerly. Raises SiteUnavailable for one that cannot."""
    refuse_plain(model, "pattern needs attention of transformers")
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

"""Every head taken out, one after the other: what all variants share below the head is computed once, and variants are run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.analysis.answers import Pairs
from AutomaticEval.analysis.reading import Batch, inputs, padded, read
from AutomaticEval.errors import EditError
from AutomaticEval.models.editing import Edit, editing
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.models.taps import Layout
from AutomaticEval.sites import Site

ROWS = 64
"""Rows of a forward over several variants."""
TOLERANCE = 1e-3
"""How far log-likelihoods of a forward that begins at a block may be from those of the whole, as a part of 1 + |l|."""


class Sweep:
    """The log-likelihoods of answers with single heads taken out.

    pairs: each with one token of an answer at least. means: layer -> [n_heads, d_head], what stands in for a head; None for zeros.
    Raises EditError for a model whose blocks cannot be run from a middle one on.
    """

    def __init__(self, loaded: LoadedModel, pairs: Pairs, means: Mapping[int, Tensor] | None = None) -> None:
        self.loaded, self.means = loaded, means
        self._layout: Layout = loaded.layout
        # padding on the left: the answers are at the end of every row, and logits there alone
        self._batch: Batch = padded([[*prompt, *answer[:-1]] for prompt, answer in pairs], "left")
        self._longest = max(len(answer) for _, answer in pairs)
        asked = [
            (row, self._longest - len(answer) + place, token)
            for row, (_, answer) in enumerate(pairs)
            for place, token in enumerate(answer)
        ]
        self._rows = torch.tensor([row for row, _, _ in asked])
        self._places = torch.tensor([place for _, place, _ in asked])
        self._targets = torch.tensor([token for _, _, token in asked])
        self._blocks = _Blocks(loaded.model, self._layout)
        self._streams = self._read()
        self.baseline = self._scores(1, None, 0)[0]
        again = self._scores(1, None, self._layout.n_layers - 1)[0]
        if not bool(((again - self.baseline).abs() <= TOLERANCE * (1 + self.baseline.abs())).all()):
            raise EditError(
                f"{type(loaded.model).__name__} cannot be run from a middle block on; take heads out one by one (heads ablate)."
            )

    def _read(self) -> list[Tensor]:
        """Of each layer: the stream that enters its block, [batch, pos, d_model], zeros at padding."""
        sites = [Site("resid_pre", layer) for layer in range(self._layout.n_layers)]
        with self._blocks.watched():
            rows = read(self.loaded.model, self._layout, self._layout.pick(sites), self._batch)
        streams = []
        for site in sites:
            whole = rows[site.key].new_zeros((*self._batch.ids.shape, self._layout.d_model))
            whole[self._batch.mask] = rows[site.key]
            streams.append(whole)
        return streams

    def layer(self, layer: int) -> Tensor:
        """[n_heads, n_pairs]: each answer's log-likelihood, in nats, without each head of a layer."""
        n_heads = self._layout.n_heads
        together = max(1, ROWS // len(self._batch.ids))
        found = [self._scores(min(together, n_heads - first), first, layer) for first in range(0, n_heads, together)]
        return torch.cat(found)

    def _scores(self, n_variants: int, first: int | None, layer: int) -> Tensor:
        """[n_variants, n_pairs] without heads first, first + 1, …; first None leaves all in."""
        model = self.loaded.model
        stream = self._streams[layer].repeat(n_variants, 1, 1)
        edits = [Edit.replace(Site("resid_pre", layer), stream)]
        if first is not None:
            edits.append(Edit(Site("z", layer), self._without(layer, first, n_variants)))
        batch = Batch(*(each.repeat(n_variants, 1) for each in self._batch))
        given = {**inputs(model, batch), "logits_to_keep": self._longest}
        with torch.no_grad(), self._blocks.handing_on(layer), editing(model, edits):
            logits = model(**given).logits
        likely = logits.float().log_softmax(-1).view(n_variants, len(self._batch.ids), self._longest, -1)
        each = likely[:, self._rows, self._places, self._targets].double().cpu()  # [n_variants, all answers' tokens]
        return torch.zeros(n_variants, len(self._batch.ids), dtype=torch.float64).index_add_(1, self._rows, each)

    def _without(self, layer: int, first: int, n_variants: int) -> Callable[[Tensor], Tensor]:
        """z [n_variants * batch, pos, width] without one head in each variant."""

        def change(found: Tensor) -> Tensor:
            split = found.reshape(n_variants, -1, found.shape[1], self._layout.n_heads, self._layout.d_head).clone()
            for variant in range(n_variants):
                head = first + variant
                instead: Any = 0.0 if self.means is None else self.means[layer][head].to(found.device, found.dtype)
                split[variant, :, :, head] = instead
            return split.reshape(found.shape)

        return change


class _Blocks:
    """A model's blocks, of which the first can be made to hand on what they are given."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        sites = [Site("resid_pre", layer) for layer in range(layout.n_layers)]
        self._blocks = [model.get_submodule(layout.taps[site].module) for site in sites]
        self._give_tuples: set[nn.Module] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Learn from a forward which blocks give a tuple."""

        def after(block: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self._give_tuples.add(block)

        with ExitStack() as hooks:
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(after).remove)
            yield

    @contextmanager
    def handing_on(self, n_blocks: int) -> Iterator[None]:
        """The first so many blocks compute nothing."""
        kept = [(block, block.__dict__.get("forward")) for block in self._blocks[:n_blocks]]
        for block, _ in kept:
            block.__dict__["forward"] = _given_as_tuple if block in self._give_tuples else _given
        try:
            yield
        finally:
            for block, own in kept:
                del block.__dict__["forward"]
                if own is not None:  # as accelerate sets it
                    block.__dict__["forward"] = own


def _given(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _given_as_tuple(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return hidden_states, None

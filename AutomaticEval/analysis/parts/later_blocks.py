"""Runs a model from any block on: what the blocks below it give is computed once, and many variants of the rest run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.capture.batch_independence import Span, apart, rope_limit
from AutomaticEval.capture.texts.forward import Batch, inputs, padded, read
from AutomaticEval.errors import EditError
from AutomaticEval.models.architecture.forward_call import takes_few_logits
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Layout
from AutomaticEval.models.refused.unsuited import refuse_virtual
from AutomaticEval.sites import Site

TOLERANCE = 1e-3
"""How far a score of a forward that begins at a block may be from that of a whole forward, as a part of 1 + |score|."""


class LaterBlocks:
    """Forwards over some sequences, padded on the left, that begin at a block of choice.

    score: takes the float32 logits [n_variants, batch, n_last, d_vocab] of the last n_last columns, and returns [n_variants, batch].
    Raises EditError for a model that cannot be run from a middle block on.
    """

    def __init__(
        self, loaded: LoadedModel, sequences: Sequence[Sequence[int]], n_last: int, score: Callable[[Tensor], Tensor]
    ) -> None:
        refuse_virtual(loaded.model, "running a part of it")
        if len(apart(loaded.model, [Span(len(each), len(each)) for each in sequences])) > 1:
            raise EditError(
                f"prompts of up to and of more than {rope_limit(loaded.model)} tokens change one another in {type(loaded.model).__name__}; "
                "sweep over them separately."
            )
        self._loaded, self._n_last, self._score = loaded, n_last, score
        self.layout: Layout = loaded.layout
        self.batch: Batch = padded(sequences, "left")
        if any(tap.stream is not None for tap in self.layout.taps.values()):
            raise EditError(
                f"{type(loaded.model).__name__} has several residual streams, so that it cannot be run from a middle block on; change its parts one "
                "by one (heads ablate, heads patch)."
            )
        self._blocks = _Blocks(loaded.model, self.layout)
        self._streams = self._read()
        self.baseline = self.scores(0)[0]
        """[batch]: the scores when nothing is changed."""
        again = self.scores(self.layout.n_layers - 1)[0]
        if not bool(((again - self.baseline).abs() <= TOLERANCE * (1 + self.baseline.abs())).all()):
            raise EditError(
                f"{type(loaded.model).__name__} cannot be run from a middle block on (LLM.int8 cannot: how it rounds depends on the "
                "whole batch); change its parts one by one (heads ablate, heads patch)."
            )

    def _read(self) -> list[Tensor]:
        """For each layer the residual stream that enters its block: [batch, pos, d_model], zeros at padding."""
        sites = [Site("resid_pre", layer) for layer in range(self.layout.n_layers)]
        with self._blocks.watched():
            rows = read(self._loaded.model, self.layout, self.layout.pick(sites), self.batch)
        return [unpacked(rows[site.key], self.batch) for site in sites]

    def scores(self, layer: int, n_variants: int = 1, edit: Edit | None = None) -> Tensor:
        """The scores of forwards that begin at a layer's block: [n_variants, batch], float64.

        edit: of [n_variants * batch, pos, width], variant after variant, at this layer or a later one. None changes nothing.
        """
        model = self._loaded.model
        stream = self._streams[layer].repeat(n_variants, 1, 1)
        edits = [Edit.replace(Site("resid_pre", layer), stream), *([] if edit is None else [edit])]
        batch = Batch(*(each.repeat(n_variants, 1) for each in self.batch))
        given = inputs(model, batch)
        if takes_few_logits(model):
            given["logits_to_keep"] = self._n_last
        with torch.no_grad(), self._blocks.skipped(layer), editing(model, edits):
            logits = model(**given).logits[:, -self._n_last :]
        return self._score(logits.float().view(n_variants, len(self.batch.ids), self._n_last, -1)).double().cpu()


def unpacked(rows: Tensor, batch: Batch) -> Tensor:
    """The rows of real tokens as a padded tensor: [real tokens, width] -> [batch, pos, width], zeros at padding."""
    whole = rows.new_zeros((*batch.ids.shape, rows.shape[-1]))
    whole[batch.mask] = rows
    return whole


class _Blocks:
    """A model's blocks. The first ones can be skipped: they then give the stream that they are given."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        sites = [Site("resid_pre", layer) for layer in range(layout.n_layers)]
        self._blocks = [model.get_submodule(tap.module) for tap in layout.pick(sites).values()]
        self._give_tuples: set[nn.Module] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Learn from a forward which blocks give a tuple."""

        def after(block: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self._give_tuples.add(block)

        with Hooks() as hooks:
            for block in self._blocks:
                hooks.after(block, after)
            yield

    @contextmanager
    def skipped(self, n_blocks: int) -> Iterator[None]:
        """The first `n_blocks` blocks compute nothing."""
        skipped = self._blocks[:n_blocks]
        own_forwards = [vars(block).get("forward") for block in skipped]  # accelerate gives instances one of their own
        try:
            for block in skipped:
                block.forward = _given_as_tuple if block in self._give_tuples else _given
            yield
        finally:
            for block, own in zip(skipped, own_forwards, strict=True):
                if own is not None:
                    block.forward = own
                elif "forward" in vars(block):
                    del block.forward


def _given(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _given_as_tuple(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return hidden_states, None

"""A model without some of its heads: their `z` is replaced in every forward, so also at every step of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.analysis.parts.before_after import Continuations, logprobs, logprobs_one_by_one
from AutomaticEval.analysis.parts.input_batches import Batcher
from AutomaticEval.analysis.parts.replaced_values import Choose, replaced_values
from AutomaticEval.capture.draws import random_numbers
from AutomaticEval.capture.texts.forward import read
from AutomaticEval.errors import EditError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site, parse_heads

MODES = ("zero", "mean", "resample")
RESAMPLE_DRAWS = 4
"""How many times a prompt is answered with other draws."""
Heads = Mapping[int, Sequence[int]]
"""Layer -> some of its heads."""


def parse_head_spec(spec: str, n_layers: int, n_heads: int) -> dict[int, list[int]]:
    """Layer -> heads from "0:0,3:5" (layer 0 head 0, layer 3 head 5), "3:0-4" or "3:*".

    Raises EditError for text that names no layer, SelectionError for a head that does not exist.
    """
    heads: dict[int, list[int]] = {}
    for item in spec.split(","):
        layer, colon, heads_of_layer = item.strip().partition(":")
        if not colon or not layer.strip().isdecimal() or int(layer) >= n_layers:
            raise EditError(
                f"{item.strip()!r} is no head: write layer:head, such as 0:0,3:5; layers are 0 to {n_layers - 1}."
            )
        named = parse_heads(None if heads_of_layer.strip() == "*" else heads_of_layer, n_heads)
        heads[int(layer)] = sorted({*heads.get(int(layer), []), *named})
    return heads


def reference_z(
    loaded: LoadedModel, layers: Sequence[int], texts: Sequence[str], batch_size: int = 8
) -> dict[int, Tensor]:
    """Layer -> z at every token of some texts: [tokens, n_heads, d_head]."""
    values = reference_values(loaded, "z", layers, texts, batch_size)
    return {layer: z.view(len(z), loaded.layout.n_heads, -1) for layer, z in values.items()}


def reference_values(
    loaded: LoadedModel, kind: str, layers: Sequence[int], texts: Sequence[str], batch_size: int = 8
) -> dict[int, Tensor]:
    """Layer -> the values of a kind of site at every token of some texts: [tokens, width]."""
    taps = loaded.layout.pick(Site(kind, layer) for layer in layers)
    batches: dict[str, list[Tensor]] = {key: [] for key in taps}
    for batch in Batcher(loaded).batches(texts, batch_size):
        for key, rows in read(loaded.model, loaded.layout, taps, batch).items():
            batches[key].append(rows)
    return {layer: torch.cat(batches[Site(kind, layer).key]) for layer in layers}


def mean_of(values: Tensor) -> Tensor:
    """The mean over tokens, computed in float64: [tokens, ...] -> [...], float32."""
    return values.double().mean(0).float()


@dataclass(frozen=True)
class Ablation:
    """Which heads are taken out, and which values stand in for theirs. Raises EditError for a wrong mode or a missing reference."""

    kind: ClassVar[str] = "ablation"

    loaded: LoadedModel
    heads: Heads

    mode: str = "zero"
    """zero; mean, each head's mean z over the reference's tokens; or resample, the z of a token of the reference that is drawn for each
    position of each prompt. The draw depends on seed, layer, number of the prompt and position only, not on the batch."""

    reference: Mapping[int, Tensor] | None = None
    """Layer -> [tokens, n_heads, d_head], as `reference_z` gives it. Needed for mean and resample."""

    seed: int = 42
    """Seed for the draws of resample."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise EditError(f"the mode {self.mode!r} is not one; write {', '.join(MODES)}.")
        if self.mode != "zero" and self.reference is None:
            raise EditError(f"{self.mode} needs a reference: texts whose z stands in for the heads'.")

    @property
    def n_draws(self) -> int:
        """How many times each prompt is answered, each time by draws of its own."""
        return RESAMPLE_DRAWS if self.mode == "resample" else 1

    @contextmanager
    def applied(self, rows: Sequence[int] | None = None, pads: Sequence[int] | None = None) -> Iterator[None]:
        """The model without the heads. rows: the number of the prompt in each row of the batch. pads: the padding on the left of each. Only
        resample needs them."""
        places = None if rows is None or pads is None else (rows, pads)
        with editing(self.loaded.model, [self._edit(layer, heads, places) for layer, heads in self.heads.items()]):
            yield

    def logprobs(self, continuations: Continuations) -> list[float]:
        """The log-likelihood of each continuation without the heads, in nats."""
        if self.mode == "resample":  # what is drawn depends on the position, which a prefix tree does not keep
            return logprobs_one_by_one(self, continuations)
        with self.applied():
            return logprobs(self.loaded, continuations)

    def _edit(self, layer: int, heads: Sequence[int], places: tuple[Sequence[int], Sequence[int]] | None) -> Edit:
        """places: the number of the prompt, and the padding on the left, of each row of the batch."""
        site = Site("z", layer)
        if self.mode == "zero" or self.reference is None:
            return Edit.scale(site, 0.0, heads=heads)
        reference = self.reference[layer][:, list(heads)]  # [tokens, heads, d_head]
        if self.mode == "mean":
            return Edit.replace(site, mean_of(reference), heads=heads)
        if places is None:
            raise EditError(
                "resample draws by prompt and position, which only forwards over left-padded prompts tell; use zero or mean here."
            )
        rows, pads = places
        drawn = [_TokensByPosition(len(reference), random_numbers(self.seed, "resample", layer, row)) for row in rows]
        return replaced_values(site, heads, _drawn_by_position(reference, drawn, pads))


class _TokensByPosition:
    """Which of the reference's tokens is drawn for each position of a prompt."""

    def __init__(self, n_tokens: int, source: np.random.Generator) -> None:
        self._n_tokens, self._source = n_tokens, source
        self._drawn: list[int] = []

    def at(self, position: int) -> int:
        while len(self._drawn) <= position:
            self._drawn += (self._source.random(64) * self._n_tokens).astype(int).tolist()
        return self._drawn[position]


def _drawn_by_position(reference: Tensor, drawn: Sequence[_TokensByPosition], pads: Sequence[int]) -> Choose:
    """Every position of every row gets the z that was drawn for it. pads: the padding on the left of each row."""

    def choose(first: int, n_columns: int) -> tuple[Kept, Tensor]:
        rows = torch.arange(len(pads)).repeat_interleave(n_columns)
        columns = torch.arange(first, first + n_columns).repeat(len(pads))
        tokens = [
            of_row.at(max(0, column - pad))
            for of_row, pad in zip(drawn, pads, strict=True)
            for column in range(first, first + n_columns)
        ]
        return Kept(rows, columns), reference[tokens]

    return choose

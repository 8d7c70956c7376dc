"""A model without some of its heads: their `z` is replaced in every forward, so also at every step of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from AutomaticEval.analysis.parts.before_after import Continuations, logprobs, logprobs_one_by_one
from AutomaticEval.analysis.parts.input_batches import Batcher
from AutomaticEval.analysis.parts.replaced_values import Choose, replaced_values
from AutomaticEval.capture.texts.forward import read
from AutomaticEval.errors import EditError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site, parse_heads

MODES = ("zero", "mean", "resample")
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
    shape = (-1, loaded.layout.n_heads, loaded.layout.d_head)
    values = reference_values(loaded, "z", layers, texts, batch_size)
    return {layer: z.view(shape) for layer, z in values.items()}


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
    position. The draw depends on seed, layer and position only: every text gets the same one, in any batch."""

    reference: Mapping[int, Tensor] | None = None
    """Layer -> [tokens, n_heads, d_head], as `reference_z` gives it. Needed for mean and resample."""

    seed: int = 42
    """Seed for the draws of resample."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise EditError(f"the mode {self.mode!r} is not one; write {', '.join(MODES)}.")
        if self.mode != "zero" and self.reference is None:
            raise EditError(f"{self.mode} needs a reference: texts whose z stands in for the heads'.")

    @contextmanager
    def applied(self, rows: Sequence[int] | None = None, pads: Sequence[int] | None = None) -> Iterator[None]:
        """The model without the heads. pads: the padding on the left of each row of the batch, which only resample needs."""
        with editing(self.loaded.model, [self._edit(layer, heads, pads) for layer, heads in self.heads.items()]):
            yield

    def logprobs(self, continuations: Continuations) -> list[float]:
        """The log-likelihood of each continuation without the heads, in nats."""
        if self.mode == "resample":  # what is drawn depends on the position, which a prefix tree does not keep
            return logprobs_one_by_one(self, continuations)
        with self.applied():
            return logprobs(self.loaded, continuations)

    def _edit(self, layer: int, heads: Sequence[int], pads: Sequence[int] | None) -> Edit:
        site = Site("z", layer)
        if self.mode == "zero" or self.reference is None:
            return Edit.scale(site, 0.0, heads=heads)
        reference = self.reference[layer][:, list(heads)]  # [tokens, heads, d_head]
        if self.mode == "mean":
            return Edit.replace(site, mean_of(reference), heads=heads)
        if pads is None:
            raise EditError(
                "resample draws by position, which only forwards over left-padded prompts tell; use zero or mean here."
            )
        drawn = _TokensByPosition(len(reference), self.seed + layer)
        return replaced_values(site, heads, _drawn_by_position(reference, drawn, pads))


class _TokensByPosition:
    """Which of the reference's tokens is drawn for each position."""

    def __init__(self, n_tokens: int, seed: int) -> None:
        self._n_tokens, self._seed = n_tokens, seed
        self._drawn = torch.empty(0, dtype=torch.long)  # [positions]

    def at(self, positions: Tensor, n_positions: int) -> Tensor:
        """positions: all below n_positions. The result has their shape."""
        if len(self._drawn) < n_positions:  # the same seed draws the same beginning again
            source = torch.Generator().manual_seed(self._seed)
            self._drawn = torch.randint(self._n_tokens, (2 * n_positions,), generator=source)
        return self._drawn[positions]


def _drawn_by_position(reference: Tensor, drawn: _TokensByPosition, pads: Sequence[int]) -> Choose:
    """Every position of every row gets the z that was drawn for it. pads: the padding on the left of each row."""

    def choose(first: int, n_columns: int) -> tuple[Kept, Tensor]:
        rows = torch.arange(len(pads)).repeat_interleave(n_columns)
        columns = torch.arange(first, first + n_columns).repeat(len(pads))
        positions = (columns - torch.tensor(list(pads))[rows]).clamp(min=0)
        return Kept(rows, columns), reference[drawn.at(positions, first + n_columns)]

    return choose

"""What a model does without some of its heads: their `z` is replaced, in every forward and at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from AutomaticEval.analysis.parts.before_after import Pairs, logprobs, logprobs_one_by_one
from AutomaticEval.analysis.parts.input_batches import Reader
from AutomaticEval.capture.texts.forward import read
from AutomaticEval.errors import EditError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.editing import Edit, editing
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site, parse_heads

MODES = ("zero", "mean", "resample")
Heads = Mapping[int, Sequence[int]]
"""Layer -> its heads."""


def parse_head_spec(spec: str, n_layers: int, n_heads: int) -> dict[int, list[int]]:
    """Layer -> heads from "0:0,3:5" (layer 0 head 0, layer 3 head 5), "3:0-4" or "3:*".

    Raises EditError for what is no head.
    """
    heads: dict[int, list[int]] = {}
    for item in spec.split(","):
        layer, colon, own = item.strip().partition(":")
        if not colon or not layer.strip().isdecimal() or int(layer) >= n_layers:
            raise EditError(
                f"{item.strip()!r} is no head: write layer:head, such as 0:0,3:5; layers are 0 to {n_layers - 1}."
            )
        found = parse_heads(None if own.strip() == "*" else own, n_heads)
        heads[int(layer)] = sorted({*heads.get(int(layer), []), *found})
    return heads


def reference_z(
    loaded: LoadedModel, layers: Sequence[int], texts: Sequence[str], batch_size: int = 8
) -> dict[int, Tensor]:
    """Layer -> z at every token of some texts: [tokens, n_heads, d_head]."""
    shape = (-1, loaded.layout.n_heads, loaded.layout.d_head)
    found = reference_values(loaded, "z", layers, texts, batch_size)
    return {layer: each.view(shape) for layer, each in found.items()}


def reference_values(
    loaded: LoadedModel, kind: str, layers: Sequence[int], texts: Sequence[str], batch_size: int = 8
) -> dict[int, Tensor]:
    """Layer -> a site at every token of some texts: [tokens, width]."""
    taps = loaded.layout.pick(Site(kind, layer) for layer in layers)
    found: dict[str, list[Tensor]] = {key: [] for key in taps}
    for batch in Reader(loaded).batches(texts, batch_size):
        for key, rows in read(loaded.model, loaded.layout, taps, batch).items():
            found[key].append(rows)
    return {layer: torch.cat(found[Site(kind, layer).key]) for layer in layers}


def mean_of(values: Tensor) -> Tensor:
    """Over tokens: [tokens, ...] -> [...]"""
    return values.double().mean(0).float()


@dataclass(frozen=True)
class Ablation:
    """Which heads are taken out, and what stands in for them.

    mode: "zero"; "mean", each head's mean z over the reference's tokens; "resample", at each position another z of the reference,
    drawn by seed: the same for that position in every text, whatever the batch. reference: `reference_z` of the layers.
    """

    loaded: LoadedModel
    heads: Heads
    mode: str = "zero"
    reference: Mapping[int, Tensor] | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise EditError(f"the mode {self.mode!r} is not one; write {', '.join(MODES)}.")
        if self.mode != "zero" and self.reference is None:
            raise EditError(f"{self.mode} needs a reference: texts whose z stands in for the heads'.")

    @contextmanager
    def applied(self, rows: Sequence[int] | None = None, pads: Sequence[int] | None = None) -> Iterator[None]:
        """The model without the heads. pads: of each row of the batch, the padding on its left; only resample needs them."""
        with editing(self.loaded.model, [self._edit(layer, own, pads) for layer, own in self.heads.items()]):
            yield

    def logprobs(self, pairs: Pairs) -> list[float]:
        """Of answers, by the model without the heads."""
        if self.mode == "resample":  # what is drawn depends on the position, which a prefix tree does not keep
            return logprobs_one_by_one(self, pairs)
        with self.applied():
            return logprobs(self.loaded, pairs)

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
        return _resampled(site, reference, heads, pads, self.seed + layer)


def _resampled(site: Site, reference: Tensor, heads: Sequence[int], pads: Sequence[int], seed: int) -> Edit:
    drawn = torch.empty(0, dtype=torch.long)  # of each position: which of the reference's tokens
    current: list[Tensor] = []

    def where(first: int, n_columns: int) -> Kept:
        nonlocal drawn
        if len(drawn) < first + n_columns:
            source = torch.Generator().manual_seed(seed)
            drawn = torch.randint(len(reference), (2 * (first + n_columns),), generator=source)
        rows = torch.arange(len(pads)).repeat_interleave(n_columns)
        columns = torch.arange(first, first + n_columns).repeat(len(pads))
        positions = (columns - torch.tensor(list(pads))[rows]).clamp(min=0)
        current[:] = [drawn[positions]]
        return Kept(rows, columns)

    return Edit(site, lambda found: reference[current[0]].to(found.device, found.dtype), heads, where)

"""Plain forwards over sequences: padding on either side changes nothing, and one that is read stops when all is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.batch_independence import counts_from_zero
from AutomaticEval.errors import ModelError
from AutomaticEval.models.architecture.forward_call import forward_takes, input_device, takes_few_logits
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.recording import Enough, Kept, Recording, capturing


class Batch(NamedTuple):
    """Sequences that are run together."""

    ids: Tensor
    """[batch, pos], int64"""
    mask: Tensor
    """[batch, pos], bool: the real tokens."""


def padded(sequences: Sequence[Sequence[int]], side: str = "right") -> Batch:
    """side: where the padding is. Which token it is does not matter."""
    width = max(map(len, sequences))
    ids, mask = (
        torch.zeros(len(sequences), width, dtype=torch.long),
        torch.zeros(len(sequences), width, dtype=torch.bool),
    )
    for row, each in enumerate(sequences):
        own = slice(width - len(each), width) if side == "left" else slice(0, len(each))
        ids[row, own], mask[row, own] = torch.tensor(each), True
    return Batch(ids, mask)


def inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """What a forward is given, so that padding on either side changes nothing.

    Positions are the model's own wherever a row begins with its first token. Raises ModelError for padding on the left where they
    do not begin at 0.
    """
    takes = forward_takes(model)
    device = input_device(model)
    given: dict[str, Any] = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.long().to(device)}
    if "position_ids" in takes and not bool(batch.mask[:, 0].all()):
        if not counts_from_zero(model):
            raise ModelError(
                f"{type(model).__name__} does not begin its positions at 0, so that prompts of different lengths cannot be run together "
                "here; give prompts of one length."
            )
        given["position_ids"] = (batch.mask.long().cumsum(1) - 1).clamp(min=0).to(device)
    return given | ({"use_cache": False} if "use_cache" in takes else {})


def read(model: Any, layout: Layout, taps: Mapping[str, Tap], batch: Batch) -> Mapping[str, Tensor]:
    """One forward. Returns key -> [real tokens, width], row after row."""
    return recorded(model, layout, taps, batch, Kept(*batch.mask.nonzero(as_tuple=True))).rows


def recorded(
    model: Any,
    layout: Layout,
    taps: Mapping[str, Tap],
    batch: Batch,
    kept: Kept,
    dtype: torch.dtype | None = None,
    given: Mapping[str, Any] | None = None,
) -> Recording:
    """One forward, which stops at the deepest tap: what is above it is not computed, unless parts of the model are offloaded.

    dtype: to narrow what is kept to. given: in place of `inputs`.
    """
    given = inputs(model, batch) if given is None else dict(given)
    if takes_few_logits(model) and "logits" not in taps:
        given["logits_to_keep"] = 1
    stops = not any(weight.is_meta for weight in model.parameters())  # accelerate puts what it fetched back at the end
    recorder = capturing(model, taps, layout.embedding, lambda *_: kept, len(batch.ids), dtype, stops=stops)
    with torch.no_grad(), recorder as recording, suppress(Enough):
        model(**given)
    return recording

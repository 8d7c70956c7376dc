"""Plain forwards over sequences. Padding on either side changes nothing, and a forward stops as soon as all wanted values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.padding_probes import counts_from_zero
from AutomaticEval.capture.tree.walk import as_mask
from AutomaticEval.errors import ModelError
from AutomaticEval.models.architecture.forward_call import forward_takes, input_device, takes_few_logits
from AutomaticEval.models.divided.division import refuse_divided
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.recording import Enough, Kept, Recording, capturing
from AutomaticEval.models.refused.unsuited import refuse_virtual


class Batch(NamedTuple):
    """Sequences that are run together, one in each row."""

    ids: Tensor
    """[batch, pos], int64"""
    mask: Tensor
    """[batch, pos], bool: True for tokens, False for padding."""


class PackedBatch(NamedTuple):
    """Sequences that are run together, several in each row, none of which sees another."""

    ids: Tensor
    """[batch, columns], int64"""
    positions: Tensor
    """[batch, columns], int64: the position of each token in its own sequence."""
    attended: Tensor
    """[batch, 1, columns, columns], bool: the columns that each token attends to."""


def padded(sequences: Sequence[Sequence[int]], side: str = "right") -> Batch:
    """Sequences as one batch. side: where the padding is, left or right. The padding has the token id 0, which no token sees."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, each in enumerate(sequences):
        own = slice(width - len(each), width) if side == "left" else slice(0, len(each))
        ids[row, own], mask[row, own] = torch.tensor(each), True
    return Batch(ids, mask)


def inputs(model: Any, batch: Batch | PackedBatch) -> dict[str, Any]:
    """The arguments of a forward with which neither padding nor other sequences of a row change anything.

    The model makes the positions itself wherever every row begins with its first token. Raises ModelError for padding on the left when the
    model's positions do not begin at 0.
    """
    takes = forward_takes(model)
    device = input_device(model)
    if isinstance(batch, PackedBatch):
        mask = as_mask(model, batch.attended.to(device))
        given = {"input_ids": batch.ids.to(device), "position_ids": batch.positions.to(device)}
        return {**given, "attention_mask": mask, "use_cache": False}
    given = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.long().to(device)}
    if not bool(batch.mask[:, 0].all()):
        refuse_virtual(model, "a batch that is padded on the left")
    if "position_ids" in takes and not bool(batch.mask[:, 0].all()):
        if not counts_from_zero(model):
            raise ModelError(
                f"{type(model).__name__} does not begin its positions at 0, so that prompts of different lengths cannot be run together "
                "here; give prompts of one length."
            )
        given["position_ids"] = (batch.mask.long().cumsum(1) - 1).clamp(min=0).to(device)
    return given | ({"use_cache": False} if "use_cache" in takes else {})


def read(model: Any, layout: Layout, taps: Mapping[str, Tap], batch: Batch) -> Mapping[str, Tensor]:
    """One forward. Returns key -> [n_tokens, width]: the tokens of the first row, then those of the second, and so on, without padding."""
    return recorded(model, layout, taps, batch, Kept(*batch.mask.nonzero(as_tuple=True))).rows


def recorded(
    model: Any,
    layout: Layout,
    taps: Mapping[str, Tap],
    batch: Batch | PackedBatch,
    kept: Kept,
    dtype: torch.dtype | None = None,
) -> Recording:
    """One forward, which stops at the deepest tap. What is above it is not computed, unless parts of the model are offloaded.

    dtype: the dtype to which the kept rows are narrowed; None leaves them as they are.
    """
    refuse_divided(model, "an analysis of texts")
    given = inputs(model, batch)
    if takes_few_logits(model) and "logits" not in taps:
        given["logits_to_keep"] = 1
    stops = not any(
        weight.is_meta for weight in model.parameters()
    )  # accelerate puts offloaded weights back when a forward ends
    recorder = capturing(model, taps, layout.embedding, lambda *_: kept, len(batch.ids), dtype, stops=stops)
    with torch.no_grad(), recorder as recording, suppress(Enough):
        model(**given)
    return recording

"""The rows of experts, computed from what one plain forward gave its router or its experts, in another way than capture computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

OF_EXPERTS = ("expert_ids", "expert_weights", "expert_out")


def expert_rows(kind: str, module: nn.Module, read: Sequence[Tensor], n_active: int) -> Tensor:
    """The rows of a kind of OF_EXPERTS, [n, width of the site].

    module: the one that was read. read: what it was given: hidden states [n, d_model], ids and weights [n, n_active], or those of them that the
    kind needs; or, of routers that say no ids, the logits [n, n_experts].
    """
    if len(read) == 1:
        logits, ids = read[0].sort(dim=-1, descending=True, stable=True)
        weights = logits[:, :n_active].exp() / logits[:, :n_active].exp().sum(-1, keepdim=True)
        return ids[:, :n_active].to(torch.int16) if kind == "expert_ids" else weights
    ids, weights = read[-2:]
    ordered, places = weights.sort(dim=-1, descending=True, stable=True)
    if kind == "expert_weights":
        return ordered
    if kind == "expert_ids":
        return torch.take_along_dim(ids, places, -1).to(torch.int16)
    outputs = []
    for place in places.unbind(-1):  # [n]: all experts run, and all weights but one are 0
        alone = torch.zeros_like(weights).scatter(-1, place[:, None], weights.gather(-1, place[:, None]))
        outputs.append(module.forward(read[0], ids, alone))
    return torch.cat(outputs, -1)

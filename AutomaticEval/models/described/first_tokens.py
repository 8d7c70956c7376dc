"""Values and heads of a model that keeps no cache, told by what its first two tokens attend to.

The first token attends to itself: its z is its v, head after head. The second one attends to two tokens: of each head, its z is one weighted mean of two
rows of v, and the weight is the same for all features of the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.sites import Site


def head_count_error(parts: Parts, layers: Sequence[int], heads: Heads, n_kv_heads: int) -> str | None:
    """Why the heads of layers without a cache are not as they are described; None when they are."""
    weights = []
    for layer in layers:
        z, v = (parts.taps.get(Site(kind, layer)) for kind in "zv")
        if z is None:
            continue
        if v is None:
            return f"its heads cannot be told: {parts.missing[Site('v', layer)]}"
        own = parts.value(z)[0].reshape(-1, heads.n, heads.d_head).double()  # [pos, head, d_head]
        values = _for_each_head(parts.value(v), heads, n_kv_heads).double()
        apart = values[0] - values[1]
        weight = ((own[1] - values[1]) * apart).sum(-1) / (apart**2).sum(-1)  # [head]
        mean = weight[:, None] * values[0] + (1 - weight[:, None]) * values[1]
        eps = torch.finfo(parts.value(z).dtype).eps
        if not (own[1] - mean).abs().max() <= 32 * eps * values[:2].abs().max():
            return f"{heads.n} heads of {heads.d_head} are described, and the second token attends to the first with several weights in one of them"
        weights.append(weight)
    for size in range(2, heads.n + 1):
        if weights and heads.n % size == 0 and all(_are_alike(each.view(-1, size), eps) for each in weights):
            return f"{heads.n} heads are described, and each {size} of them attend alike: it may have {heads.n // size}"
    return None


def _are_alike(weights: Tensor, eps: float) -> bool:
    return bool((weights - weights[:, :1]).abs().max() <= 32 * eps)


def _for_each_head(values: Tensor, heads: Heads, n_kv_heads: int) -> Tensor:
    """[pos, n_heads, d_head]: what each head attends to. values: [1, pos, n_kv_heads * d_head]."""
    return values[0].reshape(-1, n_kv_heads, heads.d_head).repeat_interleave(heads.n // n_kv_heads, 1)

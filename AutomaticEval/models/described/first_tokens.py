"""How many heads a model has that keeps no cache, told by what its second token attends to.

The second token attends to two tokens: of each head, its z is one weighted mean of two rows of v, and the weight is the same for all features of the
head. That z is such a mean was checked when v was found.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from AutomaticEval.models.architecture.heads.evidence import repeated, weights_of_second
from AutomaticEval.models.architecture.module_names import Parts
from AutomaticEval.sites import Site


def head_count_error(parts: Parts, layers: Sequence[int], n_heads: int, n_kv_heads: int | None) -> str | None:
    """Why the heads of layers without a cache are not as they are described; None when they are. n_kv_heads: None when nobody said it."""
    weights = []
    for layer in layers:
        z, v = (parts.taps.get(Site(kind, layer)) for kind in "zv")
        if z is None:
            continue
        if v is None:
            return f"its heads cannot be told: {parts.missing[Site('v', layer)]}"
        n_found = parts.n_heads[Site("v", layer)]
        if n_kv_heads not in (None, n_found):
            return f"{n_kv_heads} heads of keys and values are described, and v has {n_found} as wide as those of z"
        own = parts.rows(z)
        read = repeated(parts.rows(v).to(own.device), n_heads, own.shape[-1] // n_heads)
        weights.append(weights_of_second(read, own, n_heads))
    for size in range(2, n_heads + 1):
        if weights and n_heads % size == 0 and all(_are_alike(each.view(-1, size), own.dtype) for each in weights):
            return f"{n_heads} heads are described, and each {size} of them attend alike: it may have {n_heads // size}"
    return None


def _are_alike(weights: Tensor, dtype: torch.dtype) -> bool:
    return bool((weights - weights[:, :1]).abs().max() <= 32 * torch.finfo(dtype).eps)

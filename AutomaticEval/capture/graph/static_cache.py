"""Keys and values in tensors of one size and one address, for every layer at its full length.

transformers' own static layers for attention windows choose a branch by a Python number, and move what they hold: neither can be replayed.
Here the mask alone keeps a window. Does not know what is generated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from AutomaticEval.capture.tree.walk import Cached

STEP = 128
"""Lengths are rounded up to multiples of so many columns, so that batches of about one length share a graph."""


def rounded_up(n_columns: int) -> int:
    """The length of a cache for so many columns."""
    return -(-n_columns // STEP) * STEP


def full_length_cache(model: Any, length: int) -> StaticCache:
    """An empty cache of `length` columns, whatever the attention of each layer spans. It takes its memory when the model first fills it."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    full = [StaticLayer(max_cache_len=length) if isinstance(each, StaticLayer) else each for each in cache.layers]
    cache.layers = full  # a layer of another class holds nothing: it uses the keys and values of a layer below
    return cache


def fill(cache: StaticCache, cached: Cached, n_tokens: int, n_rows: int) -> None:
    """Put keys and values of the first n_tokens tokens, which all rows share, into an empty cache.

    cached: for each layer, keys and values [1, n_kv_heads, n_cached, d_head], or None for a layer that uses those of another.
    """
    for layer, (keys, values) in zip(cache.layers, cached, strict=True):
        if keys is None or values is None:
            continue
        own = [each[:, :, :n_tokens].expand(n_rows, -1, -1, -1) for each in (keys, values)]
        if not layer.is_initialized:
            layer.lazy_initialization(*own)
        for whole, part in zip((layer.keys, layer.values), own, strict=True):
            whole[:, :, :n_tokens].copy_(part)
        layer.cumulative_length.fill_(n_tokens)


def lengths_of(cache: StaticCache) -> list[Tensor]:
    """How many columns each layer holds, as the tensors in which the layers count them."""
    return [layer.cumulative_length for layer in cache.layers if isinstance(layer, StaticLayer)]


def size_bytes(cache: StaticCache) -> int:
    """The memory of all keys and values."""
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values) if each is not None]
    return sum(each.numel() * each.element_size() for each in tensors)

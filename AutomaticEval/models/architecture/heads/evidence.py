"""What shows that a module gives the queries, keys or values of heads, and how wide a head is.

Values are checked against the cache. Where it holds none of heads, they are checked against z: the first token of a sequence can attend to
itself alone, so that its z is its v, and the second to itself and the first, so that its z lies between the v of both. Keys are checked against the cache, too: at the first position rotary turns nothing, so that a key which
is neither normed nor scaled on its way is found in the cache as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site


def is_v(parts: Parts, layer: int, v: Tensor, n_heads: int) -> bool:
    """Whether v [1, pos, width] is what the cache holds; or, when it holds no values of heads, what the heads of the first tokens read."""
    cached, z = parts.cached(layer), parts.taps.get(Site("z", layer))
    if cached is not None and is_sum(repeated(v, *cached.shape[1::2]), cached.transpose(1, 2).flatten(2)):
        return True
    if z is None or not (cached is None or _is_of_latents(cached, n_heads)):
        return False
    return is_read(v, parts.rows(z), n_heads)


def is_read(v: Tensor, z: Tensor, n_heads: int) -> bool:
    """Whether the first token's z [1, pos, n_heads * d_head] is its v, and the second token's, in each head, lies between the v of both."""
    v = repeated(v.to(z.device), n_heads, z.shape[-1] // n_heads)
    if v.shape != z.shape or not is_sum(z[:, 0], v[:, 0]):
        return False
    first, second, mixed = (each.view(n_heads, -1).double() for each in (v[0, 0], v[0, 1], z[0, 1]))
    part = weights_of_second(v, z, n_heads)[:, None]
    off = (mixed - first - part * (second - first)).abs().amax(1)
    slack = 8 * torch.finfo(z.dtype).eps * torch.maximum(first.abs(), second.abs()).amax(1) + 1e-12
    return bool(((part > -0.1) & (part < 1.1)).all() and (off <= slack).all())


def weights_of_second(v: Tensor, z: Tensor, n_heads: int) -> Tensor:
    """How much of the second token's z is its own v, and not the first token's, in each head: [n_heads], float64.

    v, z: [1, pos, n_heads * d_head], v once for every head that reads it.
    """
    first, second, mixed = (each.view(n_heads, -1).double() for each in (v[0, 0], v[0, 1], z[0, 1]))
    way = second - first
    return ((mixed - first) * way).sum(1) / (way * way).sum(1).clamp_min(1e-30)


def _is_of_latents(cached: Tensor, n_heads: int) -> bool:
    """Whether a cache [1, n, pos, width] holds one vector for all heads, which may be no value of theirs."""
    return cached.shape[1] == 1 and n_heads > 1


def is_first_key(parts: Parts, layer: int, tap: Tap) -> bool:
    """Whether what a tap takes of the first token is its key in the cache."""
    cached, found = parts.cached(layer, "keys"), parts.rows(tap)[:, :1]
    return cached is not None and is_sum(
        repeated(found, *cached.shape[1::2]), cached[:, :, :1].transpose(1, 2).flatten(2)
    )


def repeated(rows: Tensor, n_heads: int, d_head: int) -> Tensor:
    """Rows of keys or values [1, pos, n_kv_heads * d_head], each head once for every head that reads it: [1, pos, n_heads * d_head].

    As they are, when they cannot be cut so.
    """
    n_kv_heads = rows.shape[-1] // d_head
    if rows.shape[-1] % d_head or not n_kv_heads or n_heads % n_kv_heads:
        return rows
    by_head = rows.unflatten(-1, (n_kv_heads, d_head))  # type: ignore[no-untyped-call]
    repeated: Tensor = by_head.repeat_interleave(n_heads // n_kv_heads, 2).flatten(2)
    return repeated


def d_value(parts: Parts, layer: int, heads: Heads) -> int:
    """The width of a head's value: that of z, or else what the cache or the config says."""
    z, cached = parts.taps.get(Site("z", layer)), parts.cached(layer)
    if z is not None:
        return parts.rows(z).shape[-1] // heads.n
    return heads.d_value if cached is None else cached.shape[-1]


def d_key(parts: Parts, layer: int, heads: Heads) -> int:
    """The width of a head's key; of a layer without keys of its own that of z."""
    site = Site("k", layer)
    if site in parts.taps:
        return parts.rows(parts.taps[site]).shape[-1] // parts.n_heads[site]
    return d_value(parts, layer, heads) if Site("z", layer) in parts.taps else heads.d_head


def is_normed(parts: Parts, attention: str, q: Tensor, n_heads: int) -> bool:
    """Whether the norm of queries is given q [1, pos, n_heads * d_head]."""
    norm = next(parts.named(attention, parts.names.q_norm), None)
    given = None if norm is None else parts.probe.inputs.get(norm)
    if given is None:
        return False
    given = given.transpose(1, 2) if given.dim() == 4 and given.shape[1] == n_heads else given
    return given.numel() == q.numel() and is_sum(q, given.reshape(q.shape))

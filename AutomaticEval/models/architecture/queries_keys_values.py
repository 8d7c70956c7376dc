"""The rules for queries, keys and values (q, k, v): candidates, and what shows that one is right.

Values are checked against the cache. Where it holds none of heads, they are checked against z: the first token of a sequence can attend to
itself alone, so that its z is its v. Keys help to choose: at the first position rotary turns nothing, so that a key which is neither normed nor
scaled on its way is found in the cache as it is. Queries are cut by the rule that holds for keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.latent_heads import LatentHeads
from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site

Candidate = Mapping[str, Tap]
"""Where q, k and v may be. Without q: where k and v may be."""
MODEL_PARALLEL = 4
"""In how many parts CodeGen's projection holds its heads: for each part its queries, its values, its keys."""


def find_qkv(parts: Parts, layer: int, attention: str, heads: Heads) -> None:
    """Add the taps of q, k and v of a layer, or why it lacks them."""
    candidates = [*_of_latent(parts, layer, attention, heads), *_candidates(parts, layer, attention, heads)]
    right = [each for each in candidates if _is_v(parts, layer, parts.rows(each["v"]), heads.n)]
    by_key = [each for each in right if _is_first_key(parts, layer, each["k"])]
    others = [each for each in right if "q" not in each or not _is_first_key(parts, layer, each["q"])]
    best = next(iter(by_key or others), {})
    if best:
        n_kv_heads = parts.rows(best["v"]).shape[-1] // _d_value(parts, layer, heads)
        for kind in "kv":
            parts.found(kind, layer, best[kind], n_kv_heads)
    else:
        parts.lack("kv", layer, parts.why(layer, attention, _why_no_kv(parts, layer, attention, heads)))
    q = best.get("q") or _separate_q(parts, layer, attention, heads)
    if q is not None:
        parts.found("q", layer, q, heads.n)
    else:
        parts.lack("q", layer, parts.why(layer, attention, _why_no_q(parts, layer, attention, heads)))


def experts_in(parts: Parts, attention: str) -> str | None:
    """The child of attention that is a mixture of experts, with its class (JetMoE). None without any."""
    children = ((name, type(each).__name__) for name, each in parts.model.get_submodule(attention).named_children())
    return next((f"{name}, {kind}" for name, kind in children if "experts" in name.lower()), None)


# What shows that a candidate is right.


def _is_v(parts: Parts, layer: int, v: Tensor, n_heads: int) -> bool:
    """Whether v [1, pos, width] is what the cache holds; or, when it holds no values of heads, whether the first token's v is its z."""
    cached, z = parts.cached(layer), parts.taps.get(Site("z", layer))
    if cached is not None and is_sum(_repeated(v, *cached.shape[1::2]), cached.transpose(1, 2).flatten(2)):
        return True
    if z is None or not (cached is None or _is_of_latents(cached, n_heads)):
        return False
    first = parts.rows(z)[:, :1]
    return is_sum(_repeated(v[:, :1], n_heads, first.shape[-1] // n_heads), first)


def _is_of_latents(cached: Tensor, n_heads: int) -> bool:
    """Whether a cache [1, n, pos, width] holds one vector for all heads, which may be no value of theirs."""
    return cached.shape[1] == 1 and n_heads > 1


def _is_first_key(parts: Parts, layer: int, tap: Tap) -> bool:
    """Whether what a tap takes of the first token is its key in the cache."""
    cached, found = parts.cached(layer, "keys"), parts.rows(tap)[:, :1]
    return cached is not None and is_sum(
        _repeated(found, *cached.shape[1::2]), cached[:, :, :1].transpose(1, 2).flatten(2)
    )


def _repeated(rows: Tensor, n_heads: int, d_head: int) -> Tensor:
    """Rows of keys or values [1, pos, n_kv_heads * d_head], each head once for every head that reads it: [1, pos, n_heads * d_head].

    As they are, when they cannot be cut so.
    """
    n_kv_heads = rows.shape[-1] // d_head
    if rows.shape[-1] % d_head or not n_kv_heads or n_heads % n_kv_heads:
        return rows
    by_head = rows.unflatten(-1, (n_kv_heads, d_head))  # type: ignore[no-untyped-call]
    repeated: Tensor = by_head.repeat_interleave(n_heads // n_kv_heads, 2).flatten(2)
    return repeated


def _d_value(parts: Parts, layer: int, heads: Heads) -> int:
    """The width of a head's value: that of z, or else what the cache or the config says."""
    z, cached = parts.taps.get(Site("z", layer)), parts.cached(layer)
    if z is not None:
        return parts.rows(z).shape[-1] // heads.n
    return heads.d_value if cached is None else cached.shape[-1]


# Candidates.


def _candidates(parts: Parts, layer: int, attention: str, heads: Heads) -> Iterator[Candidate]:
    """Projections of their own, one of keys and values, or one of all three whose features are cut in a known order."""
    clip = parts.setting(layer, parts.names.clip)
    k = next(parts.named(attention, parts.names.k), None)
    for v in _values(parts, layer, attention) if k is not None else ():
        yield {"k": Tap(str(k), "output", clip=clip), "v": v}
    for path in parts.named(attention, parts.names.kv):
        half = parts.probe.outputs[path].shape[-1] // 2
        first, second = (Tap(path, "output", columns=tuple(range(at, at + half))) for at in (0, half))
        yield {"k": first, "v": second}
        yield {"k": second, "v": first}
    for path in parts.named(attention, parts.names.qkv):
        d_head = _d_value(parts, layer, heads)
        for columns in _orders(parts.probe.outputs[path].shape[-1], heads.n, d_head):
            yield {
                kind: Tap(path, "output", columns=tuple(each.flatten().tolist()), clip=clip)
                for kind, each in columns.items()
            }


def _values(parts: Parts, layer: int, attention: str) -> Iterator[Tap]:
    """What may be the values beside keys of their own: as projected, times a number of the config, or normed (Gemma 4)."""
    clip = parts.setting(layer, parts.names.clip)
    scale = parts.setting(layer, parts.names.value_scale)
    for path in parts.named(attention, parts.names.v):
        yield Tap(path, "output", clip=clip)
        if scale is not None:
            yield Tap(path, "output", float(scale), clip=clip)
    for path in parts.named(attention, parts.names.v_norm):
        yield Tap(path, "output", heads_apart=parts.probe.outputs[path].dim() == 4)


def _orders(width: int, n_heads: int, d_head: int) -> Iterator[dict[str, Tensor]]:
    """The columns of queries, keys and values in the output of one projection, in each order that is known."""
    n_kv_heads, rest = divmod(width - n_heads * d_head, 2 * d_head)
    if rest or n_kv_heads < 1:
        return
    every = torch.arange(width)
    wide, narrow = n_heads * d_head, n_kv_heads * d_head
    yield dict(zip("qkv", every.split([wide, narrow, narrow]), strict=True))
    if n_heads % n_kv_heads == 0:  # for each head of keys the queries that read it, its key and its value (GPT-NeoX, Falcon)
        groups = every.view(n_kv_heads, -1, d_head)
        yield {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
    if n_kv_heads == n_heads and n_heads % MODEL_PARALLEL == 0:
        q, v, k = every.view(MODEL_PARALLEL, 3, -1).unbind(1)
        yield {"q": q, "k": k, "v": v}


def _of_latent(parts: Parts, layer: int, attention: str, heads: Heads) -> Iterator[Candidate]:
    """Keys and values that an up-projection makes of a latent, when the model's own modules lead from the one to the other as expected."""
    names = parts.names
    paths = [next(parts.named(attention, each), None) for each in (names.latent, names.latent_norm, names.up_projection)]
    z = parts.taps.get(Site("z", layer))
    if z is None or not all(paths):
        return
    latent, norm, up = map(str, paths)
    given = parts.rows(Tap(latent, "output"))
    normed, into, of_heads = (parts.rows(Tap(path, end)) for path, end in ((norm, "output"), (up, "input"), (up, "output")))
    rank, d_plain = normed.shape[-1], of_heads.shape[-1] // heads.n - _d_value(parts, layer, heads)
    is_chain = is_sum(given[..., :rank], parts.rows(Tap(norm, "input"))) and is_sum(normed, into)
    if is_chain and d_plain >= 0 and of_heads.shape[-1] % heads.n == 0:
        modules = parts.model.get_submodule(norm), parts.model.get_submodule(up)
        yield {kind: Tap(latent, "output", then=LatentHeads(kind, *modules, rank, heads.n, d_plain)) for kind in _KV}


_KV: tuple[Literal["k", "v"], ...] = ("k", "v")


def _separate_q(parts: Parts, layer: int, attention: str, heads: Heads) -> Tap | None:
    """The projection of queries, whose heads are as wide as those of keys. Half of each head may be a gate (Qwen3-Next), as the queries' norm shows."""
    path = next(parts.named(attention, parts.names.q), None)
    if path is None:
        return None
    tap = Tap(path, "output", clip=parts.setting(layer, parts.names.clip))
    width, d_head = parts.rows(tap).shape[-1], _d_key(parts, layer, heads)
    if width == heads.n * d_head:
        return tap
    if width != 2 * heads.n * d_head:
        return None
    gated = replace(tap, columns=tuple(torch.arange(width).view(heads.n, 2, d_head)[:, 0].flatten().tolist()))
    return gated if _is_normed(parts, attention, parts.rows(gated), heads.n) else None


def _d_key(parts: Parts, layer: int, heads: Heads) -> int:
    """The width of a head's key; of a layer without keys of its own that of z."""
    site = Site("k", layer)
    if site in parts.taps:
        return parts.rows(parts.taps[site]).shape[-1] // parts.n_heads[site]
    return _d_value(parts, layer, heads) if Site("z", layer) in parts.taps else heads.d_head


def _is_normed(parts: Parts, attention: str, q: Tensor, n_heads: int) -> bool:
    """Whether the norm of queries is given q [1, pos, n_heads * d_head]."""
    norm = next(parts.named(attention, parts.names.q_norm), None)
    given = None if norm is None else parts.probe.inputs.get(norm)
    if given is None:
        return False
    given = given.transpose(1, 2) if given.dim() == 4 and given.shape[1] == n_heads else given
    return given.numel() == q.numel() and is_sum(q, given.reshape(q.shape))


# Why there is none.


def _why_no_kv(parts: Parts, layer: int, attention: str, heads: Heads) -> str:
    below, names = parts.below(layer, attention), parts.names
    other = _shared_with(parts, layer, heads.n)
    if other is not None and not any(True for _ in parts.named(attention, (*names.k, *names.qkv, *names.kv))):
        return f"its layer has no keys and values of its own, and uses those of layer {other}"
    shape = _cached_shape(parts, layer)
    if shape is None and Site("z", layer) not in parts.taps:
        return "its layer keeps no values in the cache to check them against"
    path = _of_values(parts, attention)
    if path is None:
        every = ", ".join((*names.q, *names.k, *names.v, *names.kv, *names.qkv, *names.up_projection))
        return f"no projections of queries, keys and values ({every}) were found in {below}, whose parts are {parts.described(attention)}"
    gives = f"what {parts.below(layer, path)} gives"
    if shape is None:
        kind = type(parts.model.get_submodule(attention)).__name__
        return f"{below} ({kind}) keeps no values in the cache, and {gives} is in no known order what its heads read of the first token"
    if parts.cached(layer) is None:
        return f"its layer keeps values of shape {shape} in the cache; [1, n_kv_heads, pos, d_head] was expected"
    if path in parts.named(attention, names.qkv):
        return f"no known order of queries, keys and values in {parts.below(layer, path)} gives the values in the cache"
    return f"{gives} is not what the cache holds: values are changed in between"


def _cached_shape(parts: Parts, layer: int) -> list[int] | None:
    """The shape of a layer's values in the cache, whatever they are; None without any."""
    cached = parts.probe.values[layer] if layer < len(parts.probe.values) else None
    return list(cached.shape) if isinstance(cached, Tensor) and cached.numel() else None


def _of_values(parts: Parts, attention: str) -> str | None:
    """The path of the projection that gives values, perhaps among others; None when none has a known name."""
    names = parts.names
    return next(parts.named(attention, (*names.v, *names.up_projection, *names.kv, *names.qkv, *names.k)), None)


def _shared_with(parts: Parts, layer: int, n_heads: int) -> int | None:
    """The nearest layer below whose values the heads of this layer read, as those of the first token show; None without any."""
    z = parts.taps.get(Site("z", layer))
    if z is None:
        return None
    first = parts.rows(z)[:, :1]
    for other in reversed(range(layer)):
        v = parts.taps.get(Site("v", other))
        if v is not None and is_sum(_repeated(parts.rows(v)[:, :1], n_heads, first.shape[-1] // n_heads), first):
            return other
    return None


def _why_no_q(parts: Parts, layer: int, attention: str, heads: Heads) -> str:
    path, experts = next(parts.named(attention, parts.names.q), None), experts_in(parts, attention)
    if path is not None:
        width, d_head = parts.probe.outputs[path].shape[-1], _d_key(parts, layer, heads)
        return f"{parts.below(layer, path)} gives {width} features, not {heads.n} heads of {d_head}, as wide as the keys"
    if experts is not None:
        return f"{parts.below(layer, attention)} is a mixture of experts ({experts}): the queries of a token are projected by the experts that were chosen for it"
    return parts.missing.get(Site("k", layer)) or (
        f"no projection of queries ({', '.join(parts.names.q)}) was found in {parts.below(layer, attention)}, whose parts are "
        f"{parts.described(attention)}"
    )

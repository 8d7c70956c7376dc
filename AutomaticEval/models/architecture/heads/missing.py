"""Why a layer has no queries, keys or values that can be read: a reason for each, which speaks of "its layer"."""

from __future__ import annotations

from torch import Tensor

from AutomaticEval.models.architecture.heads.evidence import d_key, is_read
from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.sites import Site


def experts_in(parts: Parts, attention: str) -> str | None:
    """The child of attention that is a mixture of experts, with its class (JetMoE). None without any."""
    children = ((name, type(each).__name__) for name, each in parts.model.get_submodule(attention).named_children())
    return next((f"{name}, {kind}" for name, kind in children if "experts" in name.lower()), None)


def why_no_kv(parts: Parts, layer: int, attention: str, heads: Heads) -> str:
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
    """The nearest layer below whose values the heads of this layer read, as those of the first tokens show; None without any."""
    z = parts.taps.get(Site("z", layer))
    if z is None:
        return None
    values = {other: parts.taps.get(Site("v", other)) for other in reversed(range(layer))}
    read = (other for other, v in values.items() if v is not None and is_read(parts.rows(v), parts.rows(z), n_heads))
    return next(read, None)


def why_no_q(parts: Parts, layer: int, attention: str, heads: Heads) -> str:
    path, experts = next(parts.named(attention, parts.names.q), None), experts_in(parts, attention)
    if path is not None:
        width, d_head = parts.probe.outputs[path].shape[-1], d_key(parts, layer, heads)
        return (
            f"{parts.below(layer, path)} gives {width} features, not {heads.n} heads of {d_head}, as wide as the keys"
        )
    if experts is not None:
        return f"{parts.below(layer, attention)} is a mixture of experts ({experts}): the queries of a token are projected by the experts that were chosen for it"
    return parts.missing.get(Site("k", layer)) or (
        f"no projection of queries ({', '.join(parts.names.q)}) was found in {parts.below(layer, attention)}, whose parts are "
        f"{parts.described(attention)}"
    )

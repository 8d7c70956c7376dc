"""The rules for the heads' values before attention's output projection (z), and for queries, keys and values (q, k, v)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from AutomaticEval.models.architecture.branch_reasons import why_no_part
from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.models.head_weights import HeadResultNorms
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site

Z = ("z", "head_result_norm")
NO_HEADS = "its config says no number of attention heads (num_attention_heads)"


def find_projections(parts: Parts, heads: Heads, n_kv_heads: int) -> None:
    """Add the taps of all layers.

    heads, n_kv_heads: those of most layers. A layer with other heads lacks the sites, since rows are cut into heads by one rule for all layers.
    """
    for layer, ran in enumerate(parts.ran):
        if not ran:
            continue
        attention = parts.attention(layer)
        own = parts.heads(layer)
        if attention is None:
            parts.lack((*Z, *"qkv"), layer, why_no_part(parts, layer, "attention"))
        elif not own.n:
            parts.lack((*Z, *"qkv"), layer, NO_HEADS)
        elif own != heads:
            differs = f"its layer has {own.n} heads of {own.d_head}, and most have {heads.n} of {heads.d_head}"
            parts.lack((*Z, *"qkv"), layer, differs)
        else:
            _find_z(parts, layer, attention, own)
            _find_qkv(parts, layer, attention, own, n_kv_heads)


def _find_z(parts: Parts, layer: int, attention: str, heads: Heads) -> None:
    """z is the input of the output projection: the module whose output is what attention adds, before any norm of it."""
    added = parts.taps.get(Site("attn_out", layer))
    ends = [parts.probe.outputs[attention], *([parts.probe.outputs[added.module]] if added else [])]
    candidates = list(parts.named(attention, parts.names.out_projection))
    right = [path for path in candidates if any(is_sum(parts.probe.outputs[path], end) for end in ends)]
    for path in right:
        if parts.probe.inputs[path].shape[-1] == heads.n * heads.d_head:
            parts.taps[Site("z", layer)] = Tap(path, "input")
            parts.taps[Site("head_result_norm", layer)] = Tap(path, "input", then=HeadResultNorms(heads.n))
            return
    below = parts.below(layer, attention)
    if right:
        width = parts.probe.inputs[right[0]].shape[-1]
        reason = (
            f"{parts.below(layer, right[0])} is given {width} features, not {heads.n} heads of {heads.d_head} (d_head): "
            f"the values of its heads have another width ({width / heads.n:g})"
        )
    elif candidates:
        reason = f"what {parts.below(layer, candidates[0])} gives is not what {below} gives: something comes between"
    else:
        names = ", ".join(parts.names.out_projection)
        reason = f"no output projection ({names}) was found in {below}, whose parts are {parts.described(attention)}"
    parts.lack(Z, layer, parts.why(layer, attention, reason))


def _find_qkv(parts: Parts, layer: int, attention: str, heads: Heads, n_kv_heads: int) -> None:
    """v is checked against the values in the cache. q and k are cut by the rule that holds for v."""
    cached = parts.cached(layer)
    if cached is None:
        parts.lack("qkv", layer, "its layer keeps no values in the cache to check them against")
        return
    if cached.dim() != 4 or cached.shape[1] != n_kv_heads:
        expected_shape = f"[1, {n_kv_heads}, pos, d_head]"
        shape = list(cached.shape)
        parts.lack("qkv", layer, f"its layer keeps values of shape {shape} in the cache; {expected_shape} was expected")
        return
    expected = cached.transpose(1, 2).flatten(2)  # [1, pos, n_kv_heads * d_head]
    for taps in qkv_candidates(parts, attention, heads, n_kv_heads):
        if is_sum(parts.value(taps[2]), expected):
            for kind, tap in zip("qkv", taps, strict=True):
                parts.taps[Site(kind, layer)] = tap
            return
    parts.lack("qkv", layer, parts.why(layer, attention, _why_no_qkv(parts, layer, attention, heads, expected)))


def qkv_candidates(parts: Parts, attention: str, heads: Heads, n_kv_heads: int) -> Iterator[list[Tap]]:
    """Taps that may be those of q, k and v: three projections, or one whose features are cut in a known order."""
    separate = _separate(parts, attention)
    if all(separate):
        yield [Tap(str(path), "output") for path in separate]
    wide, narrow = heads.n * heads.d_head, n_kv_heads * heads.d_head
    for path in parts.named(attention, parts.names.qkv):
        whole = Tap(path, "output")
        if parts.probe.outputs[path].shape[-1] != wide + 2 * narrow:
            continue
        ends = [0, wide, wide + narrow, wide + 2 * narrow]  # queries, then keys, then values
        yield [replace(whole, columns=tuple(range(ends[i], ends[i + 1]))) for i in range(3)]
        if wide == narrow:  # head after head, each with its query, key and value
            columns = torch.arange(3 * wide).view(heads.n, 3, heads.d_head)
            yield [replace(whole, columns=tuple(columns[:, i].flatten().tolist())) for i in range(3)]


def _separate(parts: Parts, attention: str) -> list[str | None]:
    """The paths of the projections of queries, keys and values; None for one that is not there."""
    return [next(parts.named(attention, names), None) for names in (parts.names.q, parts.names.k, parts.names.v)]


def _why_no_qkv(parts: Parts, layer: int, attention: str, heads: Heads, expected: Tensor) -> str:
    """Why no candidate is right. expected: the values in the cache, [1, pos, n_kv_heads * d_head]."""
    separate, fused = _separate(parts, attention), next(parts.named(attention, parts.names.qkv), None)
    path = separate[2] if all(separate) else fused
    if path is None:
        names = ", ".join((*parts.names.q, *parts.names.k, *parts.names.v, *parts.names.qkv))
        below = parts.below(layer, attention)
        return f"no projections of queries, keys and values ({names}) were found in {below}, whose parts are {parts.described(attention)}"
    below, width = parts.below(layer, path), parts.probe.outputs[path].shape[-1]
    kept, queries = expected.shape[-1], heads.n * heads.d_head
    needed = queries + 2 * kept if path == fused else kept
    if width != needed:
        return (
            f"{below} gives {width} features, not the {needed} of "
            + (f"{queries} for queries and twice " if path == fused else "")
            + f"the {kept} that the cache keeps as values"
        )
    if path == fused:
        return f"no known order of queries, keys and values in {below} gives the values in the cache"
    return f"what {below} gives is not what the cache holds: values are changed in between (clipped or normed, perhaps)"

"""The rules for queries, keys and values (q, k, v): where they may be. `evidence.py` shows which of these candidates is right.

Queries are cut by the rule that holds for keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from AutomaticEval.models.architecture.heads.evidence import d_key, d_value, is_first_key, is_normed, is_v
from AutomaticEval.models.architecture.heads.latent import LatentHeads
from AutomaticEval.models.architecture.heads.missing import why_no_kv, why_no_q
from AutomaticEval.models.architecture.identities import is_sum
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
    right = [each for each in candidates if is_v(parts, layer, parts.rows(each["v"]), heads.n)]
    by_key = [each for each in right if is_first_key(parts, layer, each["k"])]
    others = [each for each in right if "q" not in each or not is_first_key(parts, layer, each["q"])]
    best = next(iter(by_key or others), {})
    if best:
        n_kv_heads = parts.rows(best["v"]).shape[-1] // d_value(parts, layer, heads)
        for kind in "kv":
            parts.found(kind, layer, best[kind], n_kv_heads)
    else:
        parts.lack("kv", layer, parts.why(layer, attention, why_no_kv(parts, layer, attention, heads)))
    q = best.get("q") or _separate_q(parts, layer, attention, heads)
    if q is not None:
        parts.found("q", layer, q, heads.n)
    else:
        parts.lack("q", layer, parts.why(layer, attention, why_no_q(parts, layer, attention, heads)))


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
        d_head = d_value(parts, layer, heads)
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
    every, wide, narrow = torch.arange(width), n_heads * d_head, n_kv_heads * d_head
    yield {"q": every[:wide], "k": every[wide : wide + narrow], "v": every[wide + narrow :]}
    if n_heads % n_kv_heads == 0:
        # of each head of keys: the queries that read it, its key, its value
        groups = every.view(n_kv_heads, -1, d_head)
        yield {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
    if n_kv_heads == n_heads and n_heads % MODEL_PARALLEL == 0:
        q, v, k = every.view(MODEL_PARALLEL, 3, -1).unbind(1)
        yield {"q": q, "k": k, "v": v}


def _of_latent(parts: Parts, layer: int, attention: str, heads: Heads) -> Iterator[Candidate]:
    """Keys and values that an up-projection makes of a latent, when the model's own modules lead from the one to the other as expected."""
    names = parts.names
    paths = [
        next(parts.named(attention, each), None) for each in (names.latent, names.latent_norm, names.up_projection)
    ]
    z = parts.taps.get(Site("z", layer))
    if z is None or not all(paths):
        return
    latent, norm, up = map(str, paths)
    given = parts.rows(Tap(latent, "output"))
    normed, into, of_heads = (parts.rows(each) for each in (Tap(norm, "output"), Tap(up, "input"), Tap(up, "output")))
    rank, d_plain = normed.shape[-1], of_heads.shape[-1] // heads.n - d_value(parts, layer, heads)
    is_chain = is_sum(given[..., :rank], parts.rows(Tap(norm, "input"))) and is_sum(normed, into)
    if is_chain and d_plain >= 0 and of_heads.shape[-1] % heads.n == 0:
        module, n_above = parts.model.get_submodule(attention), len(attention) + 1
        own = (module, norm[n_above:], up[n_above:], rank, heads.n, d_plain)
        yield {kind: Tap(latent, "output", then=LatentHeads(kind, *own)) for kind in _KV}


_KV: tuple[Literal["k", "v"], ...] = ("k", "v")


def _separate_q(parts: Parts, layer: int, attention: str, heads: Heads) -> Tap | None:
    """The projection of queries, whose heads are as wide as those of keys. Half of each head may be a gate (Qwen3-Next), as the queries' norm shows."""
    path = next(parts.named(attention, parts.names.q), None)
    if path is None:
        return None
    tap = Tap(path, "output", clip=parts.setting(layer, parts.names.clip))
    width, d_head = parts.rows(tap).shape[-1], d_key(parts, layer, heads)
    if width == heads.n * d_head:
        return tap
    if width != 2 * heads.n * d_head:
        return None
    gated = replace(tap, columns=tuple(torch.arange(width).view(heads.n, 2, d_head)[:, 0].flatten().tolist()))
    return gated if is_normed(parts, attention, parts.rows(gated), heads.n) else None

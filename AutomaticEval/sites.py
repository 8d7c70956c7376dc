"""Names of activations: which kinds of sites there are, how they are parsed, expanded and keyed.

Knows nothing of any model: `models/find_layout.py` says where a site lives in one.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from AutomaticEval.errors import SelectionError, UnknownLayer, UnknownSite, did_you_mean

LayersLike = int | str | range | Iterable[int | str | range] | None
"""Layers as people write them: 3, -1, "0-2,-1", range(4), [0, 1, -1]; None for all."""

ONCE = {
    "embed": "what enters block 0, after any positional embedding: [pos, d_model]",
    "final_norm": "output of the last norm: [pos, d_model]",
    "logits": "before softmax; logits[t] predicts token t+1: [pos, d_vocab]",
}
"""Kinds that a model has once, in a forward's order: the first stands before the layers, the others behind them."""

PER_LAYER = {
    "resid_pre": "residual stream entering the block: [pos, d_model]",
    "resid_mid": "residual stream after attention's addition; absent in parallel blocks: [pos, d_model]",
    "resid_post": "residual stream leaving the block: [pos, d_model]",
    "attn_out": "what attention adds to the stream: [pos, d_model]",
    "mlp_out": "what the MLP adds to the stream: [pos, d_model]",
    "q": "output of the query projection, before rotary: [pos, n_heads * d_head]",
    "k": "output of the key projection, before rotary: [pos, n_kv_heads * d_head]",
    "v": "output of the value projection: [pos, n_kv_heads * d_head]",
    "z": "input of the attention's output projection, head after head: [pos, n_heads * d_head]",
    "head_result_norm": "L2 norm of each head's result z_h W_O^h, without bias and post-norm: [pos, n_heads]",
    "mlp_post": "input of the MLP's down projection: [pos, d_mlp]",
}
"""Kinds that a model has once a layer."""

NOT_ROWS = {
    "head_result": "it is derived: capture 'z' and multiply each head's slice by its part of the output projection",
    "pattern": "it has no fixed width a token; keep 'q' and 'k' instead",
}
"""Kinds with a name that are not captured, and what to do instead."""

KINDS = ChainMap(PER_LAYER, ONCE)
"""All kinds: a row of either table is all that a kind needs to be parsed, expanded, keyed and ordered."""
DEFAULT_KINDS = ("embed", "resid_post")


class Site(NamedTuple):
    """A named place in the model: a kind and, except for the kinds in ONCE, a layer."""

    kind: str
    layer: int | None = None

    @property
    def key(self) -> str:
        """The name in files and dicts: `embeddings`, `layer_3`, `layer_3.mlp_out`, `final_norm`."""
        if self.layer is None:
            return "embeddings" if self.kind == "embed" else self.kind
        return f"layer_{self.layer}" if self.kind == "resid_post" else f"layer_{self.layer}.{self.kind}"


def site_of(key: str) -> Site:
    """The site that a key names; a kind that a model has once may be named by itself.

    Raises UnknownSite.
    """
    if key in ONCE or key == "embeddings":
        return Site("embed" if key == "embeddings" else key)
    match = re.fullmatch(r"layer_(\d+)(?:\.(\w+))?", key)
    if match is None or (match[2] or "resid_post") not in PER_LAYER:
        raise UnknownSite(f"no site {key!r}; write for example layer_3 (its resid_post), layer_3.z or embeddings.")
    return Site(match[2] or "resid_post", int(match[1]))


def key_order(key: str) -> tuple[int, int, int, str]:
    """For sorting keys as `expand` orders them: embeddings, layer_0.resid_pre, layer_0, …, final_norm, logits; others last."""
    head, _, kind = key.partition(".")
    number = head.removeprefix("layer_")
    if number.isdecimal():
        return (1, int(number), _rank(kind or "resid_post", PER_LAYER), key)
    rank = _rank("embed" if key == "embeddings" else key, ONCE)
    return (2 if rank else 0, 0, rank, key)


def _rank(kind: str, table: Iterable[str]) -> int:
    """Where a kind stands in a table; behind all that are there when it is not."""
    kinds = list(table)
    return kinds.index(kind) if kind in kinds else len(kinds)


def parse_kinds(sites: str | Iterable[str] | None) -> tuple[str, ...]:
    """Kinds from "resid_post,mlp_out" or a sequence of names; None gives DEFAULT_KINDS.

    Raises UnknownSite, which names the near ones.
    """
    if sites is None:
        return DEFAULT_KINDS
    names = sites.split(",") if isinstance(sites, str) else list(sites)
    kinds = tuple(dict.fromkeys(str(name).strip() for name in names))
    for kind in kinds:
        if kind in NOT_ROWS:
            raise UnknownSite(f"the site {kind!r} is not captured: {NOT_ROWS[kind]}.")
        if kind not in KINDS:
            raise UnknownSite(f"no site {kind!r}.{did_you_mean(kind, KINDS)} Sites: {', '.join(KINDS)}.")
    if not kinds:
        raise UnknownSite(f"no sites given. Sites: {', '.join(KINDS)}.")
    return kinds


def parse_layers(layers: LayersLike) -> tuple[tuple[int, int], ...] | None:
    """Inclusive (first, last) pairs, negatives still unresolved; None for all layers.

    Raises UnknownLayer for what is not a layer.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return None
    if hasattr(layers, "tolist"):  # numpy and torch
        layers = layers.tolist()
    if isinstance(layers, str):
        items: Sequence[object] = layers.split(",")
    elif isinstance(layers, Iterable) and not isinstance(layers, range):
        items = [item.tolist() if hasattr(item, "tolist") else item for item in layers]
    else:
        items = [layers]
    pairs = [pair for item in items for pair in _parse_item(item)]
    if not pairs:
        raise UnknownLayer(f"no layers in {layers!r}; write for example 0-2,-1, or leave it out for all.")
    return tuple(pairs)


def _parse_item(item: object) -> list[tuple[int, int]]:
    if isinstance(item, range):
        return [(layer, layer) for layer in item]
    match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", str(item))
    if match is None or isinstance(item, bool):
        raise UnknownLayer(f"{item!r} is not a layer; write for example 3, -1 (the last) or 0-2.")
    first, last = match.groups()
    return [(int(first), int(first if last is None else last))]


def parse_heads(heads: LayersLike, n_heads: int) -> list[int]:
    """Heads as people write layers: 3, -1, "0-2,-1", range(4), [0, 1]; None for all. In ascending order, each once.

    Raises SelectionError when a head is outside -n_heads .. n_heads - 1.
    """
    try:
        return [int(site.layer or 0) for site in expand(["z"], heads, n_heads)]
    except UnknownLayer:
        raise SelectionError(
            f"no head {heads!r}: there are {n_heads}, 0 to {n_heads - 1}; write for example 3, -1 or 0-2."
        ) from None


def expand(kinds: Iterable[str], layers: LayersLike, n_layers: int) -> tuple[Site, ...]:
    """The sites that kinds and layers name in a model of n_layers, in order, each once.

    Raises UnknownLayer when a layer is outside -n_layers .. n_layers - 1.
    """
    wanted: set[int] = set()
    for first, last in parse_layers(layers) or ((0, n_layers - 1),):
        for end in (first, last):
            if not -n_layers <= end < n_layers:
                raise UnknownLayer(
                    f"no layer {end}: the model has {n_layers} layers, 0 to {n_layers - 1} (or -{n_layers} to -1)."
                )
        low, high = first % n_layers, last % n_layers
        if low > high:
            raise UnknownLayer(f"the layers {first}-{last} run backwards (layer {low} to {high}).")
        wanted.update(range(low, high + 1))
    kinds = set(kinds)
    before, *behind = (Site(kind) if kind in kinds else None for kind in ONCE)
    by_layer = [Site(kind, layer) for layer in sorted(wanted) for kind in PER_LAYER if kind in kinds]
    return tuple(site for site in (before, *by_layer, *behind) if site is not None)

"""Names of activations: the table of all kinds of sites, and how a site is written, read, expanded and ordered.

A new kind is a row of TABLE here and a rule in `models/find_layout.py`, which says where a model has it. This file knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from AutomaticEval.errors import SelectionError, UnknownLayer, UnknownSite, did_you_mean

IDS = "int16"
"""The dtype of sites whose numbers are names of experts."""

ATTENTION_MIXES = "its block mixes tokens with attention: see attn_out"
NO_ROUTER = "its block has no router, so that it is no mixture of experts"

LayersLike = int | str | range | Iterable[int | str | range] | None
"""Layers as people write them: 3, -1, "0-2,-1", range(4), [0, 1, -1]; None for all."""


@dataclass(frozen=True)
class Kind:
    """All that is known of one kind of site, except where a model has it."""

    name: str
    meaning: str
    """What a site of this kind holds, in words."""

    width: tuple[str, ...]
    """Sizes of the model. Their product is the width of a row; with heads, the row holds head after head."""

    transformer_lens: str | None = None
    """Its name in TransformerLens' ActivationCache, with {layer} for the layer. None: TransformerLens has no such array."""

    is_per_layer: bool = True
    """Whether a model has it once a layer, or once in all."""

    dtype: str | None = None
    """The dtype that it is computed and stored in, whatever the model's dtype is. None: the model's."""

    not_stored: str | None = None
    """Why `--sites` does not take it, and what to do instead. None: `--sites` takes it."""

    not_edited: str | None = None
    """Why `editing` does not change it, and what to do instead. None: `editing` changes it."""

    absent: str | None = None
    """Why a layer may be without it by its nature, in words for a layer of which nothing else is known. None: a layer without it is looked at for the reason."""

    @property
    def heads(self) -> str | None:
        """The size that counts the heads of a row: n_heads or n_kv_heads. None for a kind without heads."""
        return self.width[0] if self.width[0] in ("n_heads", "n_kv_heads") else None

    @property
    def holds_ids(self) -> bool:
        """Whether its numbers are names, which have no mean, no length and no sum."""
        return self.dtype == IDS

    @property
    def described(self) -> str:
        """The meaning and the shape of one sequence: `output of the last norm: [pos, d_model]`."""
        return f"{self.meaning}: [pos, {' * '.join(self.width)}]"


_ROWS = (
    Kind(
        "embed",
        "what enters block 0, after any positional embedding; Hugging Face's hidden_states[0]",
        ("d_model",),
        "blocks.0.hook_resid_pre",
        is_per_layer=False,
    ),
    Kind("resid_pre", "residual stream entering the block", ("d_model",), "blocks.{layer}.hook_resid_pre"),
    Kind(
        "resid_mid",
        "residual stream after the addition of attention, or of another mixer; absent in parallel blocks",
        ("d_model",),
        "blocks.{layer}.hook_resid_mid",
        not_edited="it is read where the MLP alone receives it, and the stream goes on beside it; edit attn_out or mixer_out instead",
    ),
    Kind(
        "resid_post",
        "residual stream leaving the block; resid_pre of the next layer",
        ("d_model",),
        "blocks.{layer}.hook_resid_post",
    ),
    Kind(
        "attn_out",
        "what attention adds to the stream, after any post-norm (Gemma 2) or multiplier (Granite)",
        ("d_model",),
        "blocks.{layer}.hook_attn_out",
    ),
    Kind(
        "mixer_out",
        "what a token mixer other than attention adds to the stream (Mamba, linear attention, short convolution), by the same rule",
        ("d_model",),
        absent=ATTENTION_MIXES,
    ),
    Kind(
        "mlp_out",
        "what the MLP, or the mixture of experts, adds to the stream, by the same rule",
        ("d_model",),
        "blocks.{layer}.hook_mlp_out",
    ),
    Kind("q", "output of the query projection, before rotary", ("n_heads", "d_head"), "blocks.{layer}.attn.hook_q"),
    Kind("k", "output of the key projection, before rotary", ("n_kv_heads", "d_head"), "blocks.{layer}.attn.hook_k"),
    Kind("v", "output of the value projection", ("n_kv_heads", "d_head"), "blocks.{layer}.attn.hook_v"),
    Kind(
        "z",
        "input of the attention's output projection, head after head",
        ("n_heads", "d_head"),
        "blocks.{layer}.attn.hook_z",
    ),
    Kind(
        "head_result_norm",
        "L2 norm of each head's result z_h W_O^h, without bias and post-norm",
        ("n_heads",),
        dtype="float32",
        not_edited="it is derived; edit z instead",
    ),
    Kind(
        "mlp_post",
        "input of the MLP's down projection, after activation and gate",
        ("d_mlp",),
        "blocks.{layer}.mlp.hook_post",
    ),
    Kind(
        "router_logits",
        "the router's number for each expert of a mixture, before softmax or sigmoid and before it chooses",
        ("n_experts",),
        absent=NO_ROUTER,
    ),
    Kind(
        "expert_ids",
        "the experts that the router chose for the token, the one with the largest weight first",
        ("n_active",),
        absent=NO_ROUTER,
        dtype=IDS,
        not_edited="the router chooses; use Edit.drop_experts or Edit.only_experts, or edit router_logits",
    ),
    Kind(
        "expert_weights",
        "what the output of each of these experts is multiplied by, in the same order",
        ("n_active",),
        absent=NO_ROUTER,
        not_edited="it is derived; edit router_logits instead",
    ),
    Kind(
        "expert_out",
        "the output of each of these experts times its weight, in the same order; computed by running the experts once more, each by itself",
        ("n_active", "d_model"),
        absent=NO_ROUTER,
        not_edited="it is computed beside the forward; edit mlp_out or router_logits instead",
    ),
    Kind(
        "head_result",
        "each head's result z_h W_O^h, without bias",
        ("n_heads", "d_model"),
        not_stored="it is derived: capture 'z' and multiply each head's slice by its part of the output projection",
        not_edited="it is derived; edit z instead",
    ),
    Kind(
        "pattern",
        "attention after softmax: what a position pays to each of its sequence's positions",
        ("n_heads", "n_keys"),
        not_stored="it has no fixed width a token; keep 'q' and 'k' instead, or 'pattern' of texts with the command extract",
        not_edited="it is computed within attention, where no module gives it; edit q or k instead",
    ),
    Kind(
        "final_norm",
        "output of the last norm; Hugging Face's hidden_states[-1]",
        ("d_model",),
        "ln_final.hook_out",
        is_per_layer=False,
    ),
    Kind("logits", "before softmax; logits[t] predicts token t+1", ("d_vocab",), "logits", is_per_layer=False),
)

TABLE = {row.name: row for row in _ROWS}
"""Name -> kind, in a forward's order: kinds that a model has once stand before or behind the layers."""
KINDS = {name: row for name, row in TABLE.items() if row.not_stored is None}
"""The kinds that `--sites` takes."""
ONCE = {name: row for name, row in KINDS.items() if not row.is_per_layer}
"""Those of KINDS that a model has once."""
PER_LAYER = {name: row for name, row in KINDS.items() if row.is_per_layer}
"""Those of KINDS that a model has once a layer."""
DEFAULT_KINDS = ("embed", "resid_post")
_HOW = "One layer's site is written layer_3.mlp_out or mlp_out.3, and layer_3 is its resid_post"


class Site(NamedTuple):
    """A named place in a model: a kind and, when a model has that kind once a layer, a layer."""

    kind: str
    layer: int | None = None

    @property
    def key(self) -> str:
        """The name in files and dicts: `embeddings`, `layer_3`, `layer_3.mlp_out`, `final_norm`."""
        if self.layer is None:
            return "embeddings" if self.kind == "embed" else self.kind
        return f"layer_{self.layer}" if self.kind == "resid_post" else f"layer_{self.layer}.{self.kind}"


def kind_and_layer(text: str) -> Site:
    """What a text says, by its form alone: `layer_3.zebra` is the kind zebra of layer 3, whether there is such a kind or not."""
    match = re.fullmatch(r"layer_([0-9]{1,6})(?:\.(\w+))?", text)
    if match is not None:
        return Site(match[2] or "resid_post", int(match[1]))
    match = re.fullmatch(r"(\w+)\.([0-9]{1,6})", text)
    if match is not None:
        return Site(match[1], int(match[2]))
    return Site("embed" if text == "embeddings" else text)


def parse_site(given: str | Site) -> Site:
    """The site that people mean: the one function that reads spellings.

    `embed` and `embeddings` are one site, as are `layer_3`, `layer_3.resid_post` and `resid_post.3`, or `layer_3.mlp_out` and `mlp_out.3`.
    A kind by itself, such as `mlp_out`, is a site without a layer and stands for all layers.
    Raises UnknownSite, with near names.
    """
    site = given if isinstance(given, Site) else kind_and_layer(str(given).strip())
    if site.kind not in TABLE:
        before = "" if site.layer is None else f"layer_{site.layer}."
        near = did_you_mean(before + site.kind, [f"{before}{kind}" for kind in TABLE])
        raise UnknownSite(f"no site {_text(given)!r}.{near} Sites: {', '.join(KINDS)}. {_HOW}.")
    if site.layer is not None and not TABLE[site.kind].is_per_layer:
        raise UnknownSite(
            f"no site {_text(given)!r}: a model has {site.kind} once, not in each layer; write {site.kind}."
        )
    return site


def _text(given: str | Site) -> str:
    return given.key if isinstance(given, Site) else str(given)


def site_of(given: str | Site) -> Site:
    """The one place that a spelling names; `parse_site` lists the spellings.

    Raises UnknownSite, also for a kind that each layer has and no layer.
    """
    site = parse_site(given)
    if site.layer is None and TABLE[site.kind].is_per_layer:
        raise UnknownSite(
            f"{site.kind} is in each layer; say in which one: {Site(site.kind, 3).key} or {site.kind}.3 is that of layer 3."
        )
    return site


def key_among(keys: Collection[str], given: str | Site) -> str | None:
    """The key that a spelling names, when it is one of some keys; else None. Keys of unknown kinds are found by their own text."""
    if given in keys:
        return _text(given)
    try:
        key = site_of(given).key
    except UnknownSite:
        return None
    return key if key in keys else None


def holds_ids(key: str) -> bool:
    """Whether the site of a key holds ids in the place of quantities (expert_ids)."""
    kind = TABLE.get(kind_and_layer(key).kind)
    return kind is not None and kind.holds_ids


def refuse_ids(keys: Iterable[str], needed_by: str) -> None:
    """Raises SelectionError for sites that hold ids, whose numbers have no length, mean or direction. needed_by: what needs quantities."""
    of_ids = [key for key in keys if holds_ids(key)]
    if of_ids:
        raise SelectionError(
            f"{needed_by} needs quantities, and {', '.join(of_ids[:3])} holds ids of experts; use router_logits or expert_weights, or leave it out."
        )


def is_site(given: str) -> bool:
    """Whether a text names a site that models may have: layer_2.mlp_out, resid_post.2."""
    try:
        return site_of(given).kind in TABLE
    except UnknownSite:
        return False


def parse_sites(sites: str | Iterable[str | Site] | None) -> tuple[Site, ...]:
    """Sites to store, from "resid_post,layer_3.mlp_out" or a sequence of names, each once. None gives DEFAULT_KINDS.

    A site without a layer stands for all layers. Raises UnknownSite, also for a kind that is not stored.
    """
    if sites is None:
        return tuple(Site(kind) for kind in DEFAULT_KINDS)
    names = sites.split(",") if isinstance(sites, str) else [sites] if isinstance(sites, Site) else list(sites)
    parsed = tuple(dict.fromkeys(parse_site(name) for name in names))
    for site in parsed:
        reason = TABLE[site.kind].not_stored
        if reason is not None:
            raise UnknownSite(f"the site {site.key!r} is not captured: {reason}.")
    if not parsed:
        raise UnknownSite(f"no sites given. Sites: {', '.join(KINDS)}.")
    return parsed


def refuse_layers_twice(sites: Iterable[Site], layers: LayersLike) -> None:
    """Raises SelectionError for sites that name their layers (`layer_3.mlp_out`) when layers are given, too."""
    single = [site for site in sites if site.layer is not None]
    if single and parse_layers(layers) is not None:
        keys, kinds = ", ".join(site.key for site in single), ", ".join(dict.fromkeys(site.kind for site in single))
        raise SelectionError(
            f"the sites {keys} name their layers, and layers were given, too. Leave those layers out, or write the sites without a layer: {kinds}."
        )


def key_order(key: str) -> tuple[int, int, int, str]:
    """For sorting keys as `expand` orders them: embeddings, layer_0.resid_pre, layer_0, …, final_norm, logits; others last."""
    kind, layer = kind_and_layer(key)
    kinds = list(TABLE)
    rank = kinds.index(kind) if kind in TABLE else len(kinds)
    if layer is not None:
        return 1, layer, rank, key
    first_per_layer = next(number for number, row in enumerate(TABLE.values()) if row.is_per_layer)
    return (0 if rank < first_per_layer else 2), 0, rank, key


def keys_text(keys: Iterable[str]) -> str:
    """Keys for a person to read: of a kind that has all layers from one to another, the first and the last: `layer_0 … layer_31`."""
    by_kind: dict[str, list[Site]] = {}
    for site in map(kind_and_layer, keys):
        by_kind.setdefault(site.kind, []).append(site)
    texts = []
    for sites in by_kind.values():
        layers = [site.layer or 0 for site in sites]
        if len(sites) > 2 and layers == list(range(layers[0], layers[0] + len(layers))):
            texts.append(f"{sites[0].key} … {sites[-1].key}")
        else:
            texts += [site.key for site in sites]
    return ", ".join(texts)


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
    if not n_heads:
        raise SelectionError("this model's config says no number of attention heads, so that no head can be named.")
    try:
        return sorted(_resolved(heads, n_heads))
    except UnknownLayer:
        raise SelectionError(
            f"no head {heads!r}: there are {n_heads}, 0 to {n_heads - 1}; write for example 3, -1 or 0-2."
        ) from None


def _resolved(layers: LayersLike, n_layers: int) -> set[int]:
    """The layers that are meant in a model of n_layers, negative ones counted from its end. Raises UnknownLayer."""
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
    return wanted


def expand(sites: Iterable[str | Site], layers: LayersLike, n_layers: int) -> tuple[Site, ...]:
    """The sites of a model of n_layers that are named, in the order of a forward, each once.

    sites: kinds, of which those of each layer are taken in all the layers given; and single sites, which are taken as they are.
    Raises UnknownLayer when a layer is outside -n_layers .. n_layers - 1; UnknownSite.
    """
    wanted = _resolved(layers, n_layers)
    chosen: set[Site] = set()
    for site in map(parse_site, sites):
        if site.layer is not None:
            _resolved(site.layer, n_layers)
            chosen.add(site)
        elif TABLE[site.kind].is_per_layer:
            chosen.update(Site(site.kind, layer) for layer in wanted)
        else:
            chosen.add(site)
    return tuple(sorted(chosen, key=lambda site: key_order(site.key)))


def docs_table() -> str:
    """The table of kinds in Markdown, as it stands in `docs/sites.md`."""
    lines = [
        "| site | of | width | stored | changed by `editing` | in TransformerLens | what it is |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in TABLE.values():
        dtype = f", {row.dtype}" if row.dtype else ""
        cells = (
            f"`{row.name}`",
            "each layer" if row.is_per_layer else "the model",
            " · ".join(f"`{size}`" for size in row.width) + dtype,
            "yes" if row.not_stored is None else f"no: {row.not_stored}",
            "yes" if row.not_edited is None else f"no: {row.not_edited}",
            "–" if row.transformer_lens is None else f"`{row.transformer_lens}`",
            row.meaning,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

"""The rule for the heads' values before attention's output projection (z), and which rule finds queries, keys and values of a layer."""

from __future__ import annotations

from AutomaticEval.models.architecture.branch_reasons import why_no_part
from AutomaticEval.models.architecture.heads.missing import experts_in
from AutomaticEval.models.architecture.heads.queries_keys_values import find_qkv
from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.models.head_weights import HeadResultNorms
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site

Z = ("z", "head_result_norm")
NO_HEADS = "its config says no number of attention heads (num_attention_heads)"


def find_projections(parts: Parts, n_heads: int) -> None:
    """Add the taps of all layers.

    n_heads: that of most layers. A layer with another number lacks the sites, since a head is named by one number in all layers. How wide its
    heads are, and how many heads of keys and values it has, is each layer's own.
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
        elif own.n != n_heads:
            parts.lack((*Z, *"qkv"), layer, f"its layer has {own.n} heads, and most have {n_heads}")
        else:
            _find_z(parts, layer, attention, own)
            find_qkv(parts, layer, attention, own)


def _find_z(parts: Parts, layer: int, attention: str, heads: Heads) -> None:
    """z is the input of the output projection: the module whose output is what attention adds, before any norm of it."""
    added = parts.taps.get(Site("attn_out", layer))
    ends = [
        parts.probe.outputs[attention],
        *([parts.probe.outputs[added.module]] if added and not added.earlier else []),
    ]
    candidates = list(parts.named(attention, parts.names.out_projection))
    right = [path for path in candidates if any(is_sum(parts.probe.outputs[path], end) for end in ends)]
    for path in right:
        if parts.probe.inputs[path].shape[-1] in _z_widths(parts, layer, heads):
            parts.found("z", layer, Tap(path, "input"), heads.n)
            parts.found("head_result_norm", layer, Tap(path, "input", then=HeadResultNorms(heads.n)), heads.n)
            return
    below = parts.below(layer, attention)
    experts = experts_in(parts, attention)
    if right:
        width = parts.probe.inputs[right[0]].shape[-1]
        reason = (
            f"{parts.below(layer, right[0])} is given {width} features, not {heads.n} heads of {heads.d_head} (d_head): "
            f"the values of its heads have another width ({width / heads.n:g}), which nothing in the config or the cache has"
        )
    elif candidates:
        reason = f"what {parts.below(layer, candidates[0])} gives is not what {below} gives: something comes between"
    elif experts is not None:
        reason = (
            f"{below} is a mixture of experts ({experts}): the heads of a token are projected by the experts that were chosen for it, and no "
            "module is given them in the order of the tokens"
        )
    else:
        names = ", ".join(parts.names.out_projection)
        reason = f"no output projection ({names}) was found in {below}, whose parts are {parts.described(attention)}"
    parts.lack(Z, layer, parts.why(layer, attention, reason))


def _z_widths(parts: Parts, layer: int, heads: Heads) -> set[int]:
    """The widths that z may have: that of the heads' values, as the config says it or as the cache holds them."""
    cached = parts.cached(layer)
    each = {heads.d_head, heads.d_value} | (set() if cached is None else {cached.shape[-1]})
    return {heads.n * width for width in each}

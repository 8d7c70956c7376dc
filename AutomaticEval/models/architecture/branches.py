"""The rules for what the two branches of a block add to the residual stream, and what lies on the way: attn_out, mlp_out, resid_mid, mlp_post."""

from __future__ import annotations

from typing import NamedTuple

from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.module_names import Parts
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site

IDENTITY = "resid_pre + attn_out + mlp_out = resid_post"


class _Branch(NamedTuple):
    """A candidate: two modules whose outputs may be what attention and the MLP add. Paths begin below the block."""

    attn: str
    mlp: str
    scale: float
    """What the model multiplies both outputs by."""


def find_branches(parts: Parts) -> None:
    """Add the taps of all layers. Blocks that are built alike have one choice: the candidate for which the identity holds best."""
    alike: dict[tuple[_Branch, ...], list[int]] = {}
    for layer, ran in enumerate(parts.ran):
        if ran:
            alike.setdefault(tuple(_branches(parts, layer)), []).append(layer)
    for candidates, layers in alike.items():
        errors = {branch: _error(parts, branch, layers) for branch in candidates}
        best = min(errors, key=lambda branch: errors[branch], default=None)
        holds = best is not None and errors[best] <= 0.25
        for layer in layers:
            if best is not None and holds:
                attn, mlp = _branch_taps(parts, best, layer)
                parts.taps[Site("attn_out", layer)], parts.taps[Site("mlp_out", layer)] = attn, mlp
            else:
                parts.lack(("attn_out", "mlp_out"), layer, _why_no_branches(parts, layer, len(layers) > 1))
            _find_resid_mid(parts, layer)
            _find_mlp_post(parts, layer)


def _branches(parts: Parts, layer: int) -> list[_Branch]:
    """The candidates of a block, the plainest first."""
    block = parts.blocks[layer]
    attention = parts.children(block, parts.names.attention)
    attn = [*attention, *parts.children(block, parts.names.post_attention_norm)]
    attn += [path for parent in attention for path in parts.named(parent, parts.names.out_projection)]
    branch = [
        *parts.children(block, parts.names.mlp),
        *parts.children(block, parts.names.post_mlp_norm),
        *_down_projections(parts, block),
    ]
    scale = float(getattr(parts.config, "residual_multiplier", None) or 1.0)
    below = len(block) + 1
    return [_Branch(one[below:], other[below:], scale) for one in attn for other in branch]


def _down_projections(parts: Parts, block: str) -> list[str]:
    """Paths of the output projections in the block's MLP, or in the block itself when that is the MLP."""
    return [
        path
        for parent in parts.children(block, parts.names.mlp) or [block]
        for path in parts.named(parent, parts.names.down_projection)
    ]


def _branch_taps(parts: Parts, branch: _Branch, layer: int) -> tuple[Tap, Tap]:
    """The taps of attn_out and mlp_out when a candidate is right."""
    block = parts.blocks[layer]
    return (
        Tap(f"{block}.{branch.attn}", "output", branch.scale),
        Tap(f"{block}.{branch.mlp}", "output", branch.scale),
    )


def _error(parts: Parts, branch: _Branch, layers: list[int]) -> float:
    """Mean error of the identity over layers, as a part of what is added. Infinite when it does not hold in one of them."""
    wrong = added = 0.0
    for layer in layers:
        before = parts.value(parts.taps[Site("resid_pre", layer)])
        after = parts.value(parts.taps[Site("resid_post", layer)])
        terms = [parts.value(tap) for tap in _branch_taps(parts, branch, layer)]
        if any(term.numel() != before.numel() for term in terms):
            return float("inf")
        terms = [term.reshape(before.shape).to(after.device) for term in terms]
        if not is_sum(after, before, *terms):
            return float("inf")
        total = sum(term.double() for term in terms)
        wrong += (after.double() - before.double().to(after.device) - total).abs().mean().item()
        added += sum(term.double().abs().mean().item() for term in terms)
    return wrong / added if added else float("inf")


def _why_no_branches(parts: Parts, layer: int, has_others: bool) -> str:
    """Why a layer has neither attn_out nor mlp_out. has_others: whether other blocks are built like its block."""
    block = parts.blocks[layer]
    lacks = None
    if not parts.children(block, parts.names.attention):
        lacks = parts.no_child(layer, "attention module", parts.names.attention)
    elif not (parts.children(block, (*parts.names.mlp, *parts.names.post_mlp_norm)) or _down_projections(parts, block)):
        lacks = parts.no_child(layer, "MLP", parts.names.mlp)
    if lacks is not None:
        return f"{lacks}, so that {IDENTITY} cannot be checked"
    dtype = str(parts.value(parts.taps[Site("resid_pre", layer)]).dtype).removeprefix("torch.")
    alike = " (or in one that is built like it)" if has_others else ""
    return parts.why(
        layer,
        block,
        f"{IDENTITY} does not hold in its block{alike}, whose parts are {parts.described(block)}, or is lost in the rounding of {dtype}",
    )


def _find_mlp_post(parts: Parts, layer: int) -> None:
    """The input of the projection whose output is the MLP's, or is what the MLP adds."""
    block, added = parts.blocks[layer], parts.taps.get(Site("mlp_out", layer))
    for parent in parts.children(block, parts.names.mlp) or [block]:
        ends = [parts.probe.outputs[name] for name in (parent, added.module if added else parent)]
        for down in parts.named(parent, parts.names.down_projection):
            if any(is_sum(parts.probe.outputs[down], end) for end in ends):
                parts.taps[Site("mlp_post", layer)] = Tap(down, "input")
                return
    parts.lack(["mlp_post"], layer, _why_no_mlp_post(parts, layer))


def _why_no_mlp_post(parts: Parts, layer: int) -> str:
    block = parts.blocks[layer]
    mlp = next(iter(parts.children(block, parts.names.mlp)), None)
    down = _down_projections(parts, block)
    if mlp is None:
        unsure = f", so that {parts.below(layer, down[0])} is not known to be a part of one" if down else ""
        return parts.no_child(layer, "MLP", parts.names.mlp) + unsure
    below, kind = parts.below(layer, mlp), type(parts.model.get_submodule(mlp)).__name__
    modules = parts.model.get_submodule(mlp).named_modules()
    if any("experts" in f"{name} {type(module).__name__}".lower() for name, module in modules):
        return f"{below} ({kind}) is a mixture of experts, each with a down projection of its own"
    if down:
        reason = f"what {parts.below(layer, down[0])} gives is not what {below} gives: something comes between"
    else:
        names = ", ".join(parts.names.down_projection)
        reason = f"no down projection ({names}) was found in {below}, whose parts are {parts.described(mlp)}"
    return parts.why(layer, mlp, reason)


def _find_resid_mid(parts: Parts, layer: int) -> None:
    """The input of the first part of the block that receives resid_pre + attn_out."""
    attn, block = parts.taps.get(Site("attn_out", layer)), parts.blocks[layer]
    if attn is None:
        parts.lack(["resid_mid"], layer, parts.missing[Site("attn_out", layer)])
        return
    before, added = parts.value(parts.taps[Site("resid_pre", layer)]), parts.value(attn)
    for name, _ in parts.model.get_submodule(block).named_children():
        value = parts.probe.inputs.get(f"{block}.{name}")
        if value is None or value.numel() != before.numel():
            continue
        value = value.reshape(before.shape)
        # resid_pre itself is close to the sum, too, when attention adds little
        is_moved = (value - before).double().abs().mean() > 0.5 * added.double().abs().mean()
        if is_moved and is_sum(value, before, added):
            parts.taps[Site("resid_mid", layer)] = Tap(f"{block}.{name}", "input")
            return
    parts.lack(["resid_mid"], layer, "nothing in its block receives resid_pre + attn_out (a parallel block)")

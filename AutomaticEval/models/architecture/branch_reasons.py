"""Why a block has no attn_out, mixer_out or mlp_out: reasons that are true of that block, each checked in the small forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.module_names import OUT, Kind, Parts
from AutomaticEval.sites import Site

CALLED = {"attention": "attention", "mixer": "mixer", "mlp": "MLP"}


def why_not_in_block(parts: Parts, layer: int, kind: Kind) -> str:
    """Why a layer lacks a branch of a kind that others have: what its block holds instead."""
    attention, mixer, mlp = (parts.parts_of(layer, each) for each in OUT)
    beside = [path for path in parts.children(parts.blocks[layer], parts.names.beside) if kind != "mixer"]
    if beside:
        named = f"{parts.below(layer, beside[0])} ({type(parts.model.get_submodule(beside[0])).__name__})"
        return f"its {CALLED[kind]}, in {named}, changes what the mixer is given, and adds nothing to the stream itself: see mixer_out"
    if kind == "mlp":
        return f"its block holds no MLP, only what mixes tokens: see {OUT['mixer' if mixer else 'attention']}"
    if attention:
        return "its block mixes tokens with attention: see attn_out"
    if mixer:
        named = f"{parts.below(layer, mixer[0])} ({type(parts.model.get_submodule(mixer[0])).__name__})"
        return f"what mixes tokens in its block is {named}, no softmax attention: see mixer_out"
    return (
        "its block mixes no tokens, it holds an MLP alone: see mlp_out"
        if mlp
        else f"no {CALLED[kind]} of a known name was found in its block"
    )


def why_no_part(parts: Parts, layer: int, kind: Kind) -> str:
    """Why nothing within a part of a kind can be read: the block holds other things, whose sum is the next stream; or no such part was found."""
    is_known = any(Site(out, layer) in parts.taps for out in OUT.values())
    if is_known and Site(OUT[kind], layer) in parts.missing:
        return parts.missing[Site(OUT[kind], layer)]
    names, called = (parts.names.mlp, "MLP") if kind == "mlp" else (parts.names.attention, "attention module")
    return parts.no_child(layer, called, names)


def why_no_branches(parts: Parts, layer: int, terms: Sequence[Sequence[Tensor]], has_others: bool) -> str:
    """Why the identity of a layer does not hold.

    terms: for each candidate, what its modules give. has_others: whether other blocks are built like its block.
    """
    block, names = parts.blocks[layer], parts.names
    held: list[Kind] = [kind for kind in OUT if parts.parts_of(layer, kind)]
    mixing: Kind = "mixer" if "mixer" in held and "attention" not in held else "attention"
    both: list[Kind] = held if "mixer" in held else [mixing, "mlp"]
    identity = " + ".join(["resid_pre", *(OUT[kind] for kind in both)]) + " = resid_post"
    if parts.n_streams > 1:
        return f"its block makes {parts.n_streams} residual streams anew out of all of them: {identity} holds for none"
    normed = _why_normed(parts, layer, terms)
    if normed is not None:
        return f"{normed}, so that {identity} does not hold in its block"
    if "attention" not in held and "mixer" not in held:
        lacks = parts.no_child(layer, "attention module", names.attention)
        return f"{lacks}, so that {identity} cannot be checked"
    if "mlp" not in held and "mixer" not in held and not list(parts.named(block, names.down_projection)):
        return f"{parts.no_child(layer, 'MLP', names.mlp)}, so that {identity} cannot be checked"
    whole = parts.model.get_submodule(block)
    own = [name for name, _ in (*whole.named_parameters(recurse=False), *whole.named_buffers(recurse=False))]
    alike = " (or in one that is built like it)" if has_others else ""
    if own:
        reason = f"{identity} does not hold in its block{alike}, which has numbers of its own ({', '.join(own)}) that may scale the stream"
    else:
        dtype = str(parts.value(parts.taps[Site("resid_pre", layer)]).dtype).removeprefix("torch.")
        reason = f"{identity} does not hold in its block{alike}, whose parts are {parts.described(block)}, or is lost in the rounding of {dtype}"
    return parts.why(layer, block, reason)


def _why_normed(parts: Parts, layer: int, terms: Sequence[Sequence[Tensor]]) -> str | None:
    """Why no sum gives resid_post when the block's norms stand in the stream itself. None when they do not."""
    block, after = parts.blocks[layer], parts.value(parts.taps[Site("resid_post", layer)])
    for name, module in parts.model.get_submodule(block).named_children():
        gave = parts.probe.outputs.get(f"{block}.{name}")
        if gave is None or gave.numel() != after.numel() or "norm" not in type(module).__name__.lower():
            continue
        gave = gave.reshape(after.shape)
        if is_sum(after, gave):
            return f"the norm {name} stands behind the last addition: resid_post is what it gives"
        if any(_is_mixed(after, gave, added) for added in terms):
            return f"the norm {name} stands in the stream: what is added is added to what it gives"
    return None


def _is_mixed(after: Tensor, normed: Tensor, added: Sequence[Tensor]) -> bool:
    """Whether a tensor is made of what a norm gives and of what is added, each times a number."""
    if any(term.numel() != after.numel() for term in added):
        return False
    columns = torch.stack([each.double().cpu().flatten() for each in (normed, *added)], 1)
    wanted = after.double().cpu().flatten()
    factors = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    left = wanted - columns @ factors
    return bool(left.norm() < 1e-4 * wanted.norm()) and bool(factors[0].abs() > 1e-2)

"""Whether what a person has described is so. Sums tell neither attention from the MLP nor one head from two: these checks do.

They run for described models alone. Names that are known of families have been checked by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.description import NAMES, PATHS
from AutomaticEval.models.architecture.identities import PROBE_LENGTH, is_sum
from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.models.described.first_tokens import head_count_error
from AutomaticEval.models.described.interventions import mixes_positions, moved_by_first_token
from AutomaticEval.models.described.offered import not_found
from AutomaticEval.models.described.stand_ins import are_active
from AutomaticEval.sites import Site

IN_BLOCK = ("attention", "mlp", "post_attention_norm", "post_mlp_norm")
"""Parts that are children of a block, or paths below it."""
OF_HEADS = ("z", "head_result_norm", "q", "k", "v")


def check_logits(parts: Parts) -> None:
    """Raises UnsupportedModel when the logits of a described model are not what it returns."""
    if not parts.names.given:
        return
    path = parts.lm_head
    logits = parts.probe.outputs.get(path or "")
    if logits is None or logits.dim() != 3 or logits.shape[:2] != (1, PROBE_LENGTH):
        found = "no tensor" if logits is None else f"a tensor of shape {list(logits.shape)}"
        raise UnsupportedModel(
            f"{parts.name}: {path or 'its forward'} gives {found} first, not logits [1, {PROBE_LENGTH}, d_vocab]; describe lm_head, the module "
            "that gives them."
        )
    if path is not None and not any(is_sum(each, logits) for each in parts.probe.returned):
        raise UnsupportedModel(f"{parts.name}: what {path} (lm_head) gives is not among what the model returns.")


def given_kv_heads(parts: Parts) -> int | None:
    """The number of heads of keys and values that a person has said; None when nobody did."""
    return parts.config.num_key_value_heads if "n_kv_heads" in parts.names.given else None


def check_description(parts: Parts, heads: Heads) -> None:
    """Raises UnsupportedModel for a description that is wrong. Sites whose heads cannot be told are moved to `parts.missing`.

    heads: those of most layers.
    """
    if not parts.names.given:
        return
    _check_blocks(parts)
    _check_names(parts)
    _check_norms(parts)
    if not are_active():  # without weights, a second forward gives other numbers anyway
        _check_mixing(parts)
    _check_heads(parts, heads)
    if not are_active():
        _check_queries(parts)


def _check_blocks(parts: Parts) -> None:
    """Raises UnsupportedModel when other modules of the blocks' classes stand beside those that are described."""
    kinds = {type(parts.model.get_submodule(block)) for block in parts.blocks}
    others = [
        path
        for path, module in parts.model.named_modules()
        if type(module) in kinds and not any(f"{path}.".startswith(f"{block}.") for block in parts.blocks)
    ]
    if "blocks" in parts.names.given and others:
        raise UnsupportedModel(
            f"{parts.name}: {len(parts.blocks)} blocks are described, and {', '.join(others[:3])} {'is' if len(others) == 1 else 'are'} built like them; "
            "give all blocks."
        )


def _check_names(parts: Parts) -> None:
    """Raises UnsupportedModel for a name that no block has."""
    for what in parts.names.given:
        if what in PATHS or what not in NAMES:
            continue
        names = getattr(parts.names, what)
        if not any(_found(parts, block, what, names) for block in parts.blocks):
            block = parts.blocks[parts.ran.index(True)]
            raise not_found(
                parts.model,
                parts.names,
                f"{parts.name}: no block has a module {' or '.join(names)} ({what}); {block} holds {parts.described(block)}",
            )


def _found(parts: Parts, block: str, what: str, names: tuple[str, ...]) -> bool:
    return bool(parts.children(block, names) if what in IN_BLOCK else next(parts.named(block, names), None))


def _check_norms(parts: Parts) -> None:
    """Raises UnsupportedModel when a norm that is said to be behind a branch is given something else."""
    for layer, ran in enumerate(parts.ran):
        for kind, branch, norm in (
            ("attn_out", "attention", "post_attention_norm"),
            ("mlp_out", "mlp", "post_mlp_norm"),
        ):
            tap, block = parts.taps.get(Site(kind, layer)), parts.blocks[layer]
            norms = parts.children(block, getattr(parts.names, norm))
            if not ran or tap is None or tap.module not in norms or norm not in parts.names.given:
                continue
            given = parts.probe.inputs[tap.module]
            branches = parts.children(block, getattr(parts.names, branch))
            if not any(is_sum(given, parts.probe.outputs[each].reshape(given.shape)) for each in branches):
                raise UnsupportedModel(
                    f"{parts.name}: {parts.below(layer, tap.module)} ({norm}) is not given what {', '.join(branches) or branch} gives in layer {layer}."
                )


def _check_mixing(parts: Parts) -> None:
    """Raises UnsupportedModel when what is said to be attention looks at each token alone, or when the MLP does not."""
    if not {"attention", "mlp"} & set(parts.names.given):
        return
    asked = [
        (path, part)
        for part in ("attention", "mlp")
        for block, ran in zip(parts.blocks, parts.ran, strict=True)
        for path in (parts.children(block, getattr(parts.names, part)) if ran else ())
    ]
    mixes = mixes_positions(parts.model, parts.probe.ids, {path for path, _ in asked})
    for path, part in asked:
        if path not in mixes or mixes[path] is (part == "attention"):
            continue
        does = (
            "depends on the tokens before it, as only attention's does"
            if mixes[path]
            else "depends on that token alone"
        )
        raise UnsupportedModel(f"{parts.name}: {path} is described as {part}, but what it gives at a token {does}.")


def _check_heads(parts: Parts, heads: Heads) -> None:
    """Move the sites of heads to `parts.missing` where their number, which a person gave, does not fit what attention computes."""
    if not {"n_heads", "d_head", "n_kv_heads"} & set(parts.names.given):
        return
    layers = [layer for layer in range(len(parts.blocks)) if Site("z", layer) in parts.taps]
    error = head_count_error(
        parts, [layer for layer in layers if parts.cached(layer) is None], heads.n, given_kv_heads(parts)
    )
    for layer in layers:
        cached = parts.cached(layer)
        reason = error
        if cached is not None:
            kept = cached.shape[-1]
            reason = (
                None
                if kept == heads.d_head
                else f"its heads are described as {heads.n} of {heads.d_head}, and its cache keeps heads of {kept}"
            )
        if reason is not None:
            _move(parts, layer, OF_HEADS, reason)


def _check_queries(parts: Parts) -> None:
    """Move q and k to `parts.missing` where changing them at the first token does not do what changing queries and keys does.

    The first token attends to itself alone. So its query decides nothing, and its key decides nothing of its own z.
    """
    if not {"q", "k", "qkv"} & set(parts.names.given):
        return
    z = {layer: tap for layer in range(len(parts.blocks)) if (tap := parts.taps.get(Site("z", layer))) is not None}
    for kind, where, rows in (("q", "anywhere", slice(None)), ("k", "at that token", slice(0, 1))):
        taps = {layer: tap for layer in z if (tap := parts.taps.get(Site(kind, layer))) is not None}
        if not taps:
            continue
        moved = moved_by_first_token(
            parts.model, parts.probe.ids, taps.values(), {z[layer].module: layer for layer in taps}
        )
        for layer, value in moved.items():
            if not _is_close(value[:, rows], parts.value(z[layer])[:, rows]):
                other = f"changing {parts.below(layer, taps[layer].module)} ({kind}) at the first token changes z {where}, which {_WHAT[kind]} do not"
                _move(parts, layer, ("q", "k"), other)


_WHAT: Mapping[str, str] = {"q": "queries", "k": "keys"}


def _is_close(one: Tensor, other: Tensor) -> bool:
    size = other.abs().max().item()
    return torch.allclose(one.double(), other.double(), rtol=0, atol=(1e-4 + 8 * torch.finfo(other.dtype).eps) * size)


def _move(parts: Parts, layer: int, kinds: Any, reason: str) -> None:
    for kind in kinds:
        if parts.taps.pop(Site(kind, layer), None) is not None:
            parts.n_heads.pop(Site(kind, layer), None)
            parts.lack([kind], layer, reason)

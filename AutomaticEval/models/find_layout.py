"""Where each site is in a Hugging Face decoder: found in the module tree, then verified on a few tokens.

The names in `models/architecture/description.py` point at modules. One small forward checks that each holds what the site's name says; a
site for which that is not so is refused, and never stored. A new kind of site needs a rule in `_layout`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from torch import nn

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.branches import find_branches
from AutomaticEval.models.architecture.division import n_processes, refuse_uneven
from AutomaticEval.models.architecture.forward_call import (
    alone_with,
    attends_both_ways,
    input_device,
    needed_besides_ids,
)
from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.inner_model import inner, is_compiled, virtual_tokens
from AutomaticEval.models.architecture.module_names import Parts
from AutomaticEval.models.architecture.projections import Z, find_projections
from AutomaticEval.models.edited_models import layout_of
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.weights.fingerprint import hash_of_tensor
from AutomaticEval.processes import join_ranks
from AutomaticEval.sites import PER_LAYER, TABLE, Site


class _Known(NamedTuple):
    """The layout of an inner model, and the layouts of the models that it was seen in."""

    compiled: frozenset[str]
    """The paths of what was compiled then. When more is compiled later, hooks within it no longer fire, and the layout is found again."""
    layout: Layout
    of: weakref.WeakKeyDictionary[nn.Module, Layout]
    """Model -> the layout with the paths that it has in that model."""


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def find_layout(model: nn.Module) -> Layout:
    """The layout of a decoder, found by one forward over a few tokens, and remembered as long as the model lives.

    Raises UnsupportedModel for encoder-decoders and encoders, for compiled models, for models in training mode or tuned by virtual tokens, and
    for models whose blocks are not found.
    """
    refuse_unready(model)
    tuning = virtual_tokens(model)
    if tuning is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} is tuned by virtual tokens ({tuning}), which stand before what is fed, so that it is not known which row is "
            "which token's. To capture it without them, pass model.get_base_model()."
        )
    whole = inner(model)
    with alone_with(model):
        compiled = frozenset(name for name, module in whole.named_modules() if is_compiled(module))
        if whole not in _known or _known[whole].compiled != compiled:
            while_edited: Layout | None = layout_of(model)
            if while_edited is not None:  # a forward now would show the edits
                return _seen_from(model, while_edited)
            n_hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
            layout = _layout(Parts(model))
            if layout.missing and n_hooks:  # a site may be missing because of these hooks, and be there without them
                return _seen_from(model, layout)
            _known[whole] = _Known(compiled, layout, weakref.WeakKeyDictionary())
        known = _known[whole]
        if model not in known.of:
            known.of[model] = _seen_from(model, known.layout)
        return known.of[model]


def _seen_from(model: nn.Module, layout: Layout) -> Layout:
    """The layout of an inner model, with the paths that its modules have in the model around it."""
    whole = inner(model)
    prefix = next(name for name, module in model.named_modules() if module is whole)
    return layout.under(prefix) if prefix else layout


def refuse_unready(model: nn.Module) -> None:
    """Raises UnsupportedModel for compiled models, models in training mode, and encoder-decoders."""
    whole = inner(model)
    for module in model.modules():  # the modules around the inner model come first
        if is_compiled(module):
            raise UnsupportedModel(
                f"{type(module).__name__} is compiled: hooks do not fire reliably. Pass the model before torch.compile."
            )
        if module is whole:
            break
    refuse_untrue(model)


def refuse_untrue(model: nn.Module) -> None:
    """Raises UnsupportedModel for models in training mode, where dropout changes every number, for encoder-decoders, for models that
    cannot be asked by text alone, or whose tokens attend to those behind them, and for a kernel of attention that cannot run."""
    name = type(model).__name__
    if any(module.training for module in model.modules()):
        raise UnsupportedModel(f"{name} is in training mode: dropout changes every value. Call model.eval() first.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are asked and captured.")
    needed = needed_besides_ids(model)
    if needed:
        raise UnsupportedModel(
            f"{name} needs {' and '.join(needed)} in every forward; only models that take text alone are asked and captured."
        )
    kernel = getattr(inner(model).config.get_text_config(), "_attn_implementation", None)
    if kernel == "flex_attention" and input_device(model).type == "cpu":
        raise UnsupportedModel(
            f"{name} attends with flex_attention, which torch cannot compile for batches on a CPU; load it with attn_implementation='sdpa'."
        )
    refuse_uneven(model)
    both_ways = attends_both_ways(model)
    if both_ways is not None:
        raise UnsupportedModel(
            f"a token of {name} attends to the tokens behind it ({both_ways}), so that it sees the answer that it should predict, and its rows "
            "change with every token; only decoders are asked and captured."
        )


def _layout(parts: Parts) -> Layout:
    """All rules in turn: each adds the taps of its kinds to `parts.taps`, or to `parts.missing` why a layer lacks them."""
    n_layers = len(parts.blocks)
    _check_embedding(parts)
    parts.taps[Site("embed")] = Tap(parts.blocks[parts.ran.index(True)], "input")
    parts.taps[Site("logits")] = Tap("", "output")
    _find_final_norm(parts)
    for layer in range(n_layers):
        _find_residual(parts, layer)
    find_branches(parts)
    own = [parts.heads(layer) for layer, ran in enumerate(parts.ran) if ran]
    heads = max(own, key=own.count)
    cached = [value.shape[1] for value in parts.probe.values if value is not None and value.dim() == 4]
    n_kv_heads = max(cached, key=cached.count) if cached else heads.n
    n_divided = n_processes(parts.model)
    if n_divided > 1:  # the cache of a process holds a part of the heads
        n_kv_heads = getattr(parts.config, "num_key_value_heads", None) or heads.n
    find_projections(parts, heads, n_kv_heads)
    if n_divided > 1:
        _refuse_parts(parts, n_divided)
    sizes = {"d_model": parts.d_model, "n_heads": heads.n, "n_kv_heads": n_kv_heads, "d_head": heads.d_head}
    widths = {site: _width(parts, site, tap, sizes) for site, tap in parts.taps.items()}
    return Layout(n_layers, **sizes, embedding=parts.embedding, taps=parts.taps, widths=widths, missing=parts.missing)


def _refuse_parts(parts: Parts, n: int) -> None:
    """Leave the sites out of which each of n processes has a part: those whose values differ among the processes, and all that are found in
    attention and MLP."""
    own = {site: hash_of_tensor(parts.value(replace(tap, then=None))) for site, tap in parts.taps.items()}
    by_process = join_ranks().gathered(own)
    reason = f"the model is divided among {n} processes (tensor parallel), and each has a part of it"
    within = [Site(kind, layer) for kind in (*Z, *"qkv", "mlp_post") for layer, ran in enumerate(parts.ran) if ran]
    differing = [site for site in own if any(each.get(site) != own[site] for each in by_process)]
    for site in (*within, *differing):
        parts.taps.pop(site, None)
        parts.missing[site] = reason


def _width(parts: Parts, site: Site, tap: Tap, sizes: Mapping[str, int]) -> int:
    """The width that a site has in the small forward; for what is derived of it, the width of its kind."""
    if tap.then is None:
        return parts.value(tap).shape[-1]
    return prod(sizes[name] for name in TABLE[site.kind].width)


def _check_embedding(parts: Parts) -> None:
    """Raises UnsupportedModel when the token embedding does not receive the token ids that the model is fed."""
    given = parts.probe.inputs.get(parts.embedding)
    if given is None or given.shape != parts.probe.ids.shape or not bool((given == parts.probe.ids).all()):
        raise UnsupportedModel(
            f"{parts.name}: its input embedding {parts.embedding} is given {None if given is None else list(given.shape)}, not the ids "
            f"{list(parts.probe.ids.shape)} that the model is fed, so that it cannot be seen which row is which token's."
        )


def _find_final_norm(parts: Parts) -> None:
    if parts.norm is None:
        parts.missing[Site("final_norm")] = (
            f"no norm of a known name stands beside the blocks, only {parts.described(parts.owner)}"
        )
    elif parts.probe.n_fired[parts.norm] != 1:
        n_times = parts.probe.n_fired[parts.norm]
        parts.missing[Site("final_norm")] = (
            f"{parts.norm} is used {n_times} times in a forward, not once behind the last block"
        )
    else:
        parts.taps[Site("final_norm")] = Tap(parts.norm, "output")


def _find_residual(parts: Parts, layer: int) -> None:
    """resid_pre and resid_post of a layer. resid_post is read where the next part receives it, so that edits between blocks are seen."""
    if not parts.ran[layer]:
        parts.lack(PER_LAYER, layer, "its block does not run in a forward over text (as those that attend to images)")
        return
    here = parts.blocks[layer]
    after = next(
        (block for block, ran in zip(parts.blocks[layer + 1 :], parts.ran[layer + 1 :], strict=True) if ran), None
    )
    # a final norm that is used in several places is no tap, and does not say where the stream is
    if after is None and Site("final_norm") in parts.taps:
        after = parts.norm
    given, gave = parts.probe.inputs.get(after or here), parts.probe.outputs.get(here)
    if gave is None or given is None or (after is not None and not is_sum(given, gave)) or gave.isnan().any():
        shapes = [None if each is None else list(each.shape) for each in (gave, given)]
        raise UnsupportedModel(
            f"{parts.name}: what {after} receives (shape {shapes[1]}) is not what block {layer} returns (shape {shapes[0]}), or it is NaN, so "
            "the residual stream cannot be named. If a hook of yours edits the stream, run once without it first."
        )
    parts.taps[Site("resid_pre", layer)] = Tap(here, "input")
    parts.taps[Site("resid_post", layer)] = Tap(here, "output") if after is None else Tap(after, "input")

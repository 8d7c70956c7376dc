"""Where each site is in a Hugging Face decoder: found in the module tree, then verified on a few tokens.

The names in `models/architecture/description.py` point at modules. One small forward checks that each holds what the site's name says; a
site for which that is not so is refused, and never stored. A new kind of site needs a rule in `_layout`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.branches import find_branches
from AutomaticEval.models.architecture.description import Description
from AutomaticEval.models.architecture.experts import find_experts
from AutomaticEval.models.architecture.forward_call import (
    alone_with,
)
from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.inner_model import inner, is_compiled, virtual_tokens
from AutomaticEval.models.architecture.module_names import Heads, Parts
from AutomaticEval.models.architecture.projections import find_projections
from AutomaticEval.models.architecture.stream import find_residual
from AutomaticEval.models.described.checks import check_description, check_logits
from AutomaticEval.models.described.given_config import numbers_of
from AutomaticEval.models.described.remembered import description_of
from AutomaticEval.models.divided.division import n_processes
from AutomaticEval.models.divided.whole_sites import refuse_parts
from AutomaticEval.models.edited_models import layout_of
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.refused.unsuited import refuse_unready, refuse_virtual
from AutomaticEval.sites import TABLE, Site


class _Known(NamedTuple):
    """The layout of an inner model, and the layouts of the models that it was seen in."""

    description: Description
    """How the model was described then. When it is described anew, the layout is found again."""
    compiled: frozenset[str]
    """The paths of what was compiled then. When more is compiled later, hooks within it no longer fire, and the layout is found again."""
    numbers: tuple[Any, ...]
    """What the layout depended on besides modules: a dtype, a multiplier, how many experts a token has. When they change, it is found again."""
    layout: Layout
    of: weakref.WeakKeyDictionary[nn.Module, Layout]
    """Model -> the layout with the paths that it has in that model."""


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def find_layout(model: nn.Module) -> Layout:
    """The layout of a decoder, found by one forward over a few tokens, and remembered as long as the model lives.

    A model with a soft prompt has the layout of its inner model. Raises UnsupportedModel for encoder-decoders and encoders, for compiled models,
    for models in training mode or tuned by virtual tokens of an untested kind, and for models whose blocks are not found.
    """
    refuse_unready(model)
    virtual = virtual_tokens(model)
    if virtual is not None and not (virtual.are_columns or virtual.are_cached):
        refuse_virtual(model, "capturing")
    whole = inner(model)
    with alone_with(model):
        compiled = frozenset(name for name, module in whole.named_modules() if is_compiled(module))
        description = description_of(model)
        seen = (description, compiled, numbers_of(whole, description))
        if whole not in _known or _known[whole][:3] != seen:
            while_edited: Layout | None = layout_of(model)
            if while_edited is not None:  # a forward now would show the edits
                return _seen_from(model, while_edited)
            n_hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
            layout = _layout(Parts(model if virtual is None else whole, description))
            if layout.missing and n_hooks:  # a site may be missing because of these hooks, and be there without them
                return _seen_from(model, layout)
            _known[whole] = _Known(*seen, layout, weakref.WeakKeyDictionary())
        known = _known[whole]
        if model not in known.of:
            known.of[model] = _seen_from(model, known.layout)
        return known.of[model]


def _seen_from(model: nn.Module, layout: Layout) -> Layout:
    """The layout of an inner model, with the paths that its modules have in the model around it."""
    whole = inner(model)
    prefix = next(name for name, module in model.named_modules() if module is whole)
    return layout.under(prefix) if prefix else layout


def _layout(parts: Parts) -> Layout:
    """All rules in turn: each adds the taps of its kinds to `parts.taps`, or to `parts.missing` why a layer lacks them."""
    n_layers = len(parts.blocks)
    _check_embedding(parts)
    parts.taps[Site("logits")] = Tap(parts.lm_head or "", "output")
    check_logits(parts)
    _find_final_norm(parts)
    find_residual(parts)
    find_branches(parts)
    own = [parts.heads(layer) for layer, ran in enumerate(parts.ran) if ran]
    find_projections(parts, _most([each.n for each in own]))
    find_experts(parts)
    refuse_parts(parts)
    check_description(parts, _most(own))
    sizes: dict[str, Any] = _sizes(parts, own)
    others = {site: n for site, n in parts.n_heads.items() if n != sizes[str(TABLE[site.kind].heads)]}
    return Layout(
        n_layers,
        **sizes,
        embedding=parts.embedding,
        taps=parts.taps,
        widths={site: _width(parts, site, tap) for site, tap in parts.taps.items()},
        norm=parts.norm,
        notes=parts.notes,
        missing=parts.missing,
        other_heads=others,
    )


def _sizes(parts: Parts, own: Sequence[Heads]) -> dict[str, int]:
    """The sizes that most layers have. own: the heads of the layers that run, as the config gives them."""
    n_heads = _most([each.n for each in own])
    queries = {site: tap for site, tap in parts.taps.items() if site.kind == "q"}
    per_head = [_width(parts, site, tap) // parts.n_heads[site] for site, tap in queries.items()]
    return {
        "d_model": parts.d_model,
        "n_heads": n_heads,
        "n_kv_heads": _n_kv_heads(parts) or n_heads,
        "d_head": _most(per_head or [each.d_head for each in own]),
    }


_T = TypeVar("_T")


def _most(values: Sequence[_T]) -> _T:
    """The value that is there most often."""
    return max(values, key=values.count)


def _n_kv_heads(parts: Parts) -> int:
    """The heads of keys and values in most layers, as they were found or else as they are in the cache; 0 when neither is known."""
    found = [n for site, n in parts.n_heads.items() if site.kind == "v"]
    cached = [value.shape[1] for value in parts.probe.values if value is not None and value.dim() == 4]
    if n_processes(parts.model) > 1:  # the cache of a process holds a part of the heads
        return int(getattr(parts.config, "num_key_value_heads", None) or 0)
    return int(_most(found or cached or [0]))


def _width(parts: Parts, site: Site, tap: Tap) -> int:
    """The width that a site has in the small forward."""
    return parts.n_heads[site] if site.kind == "head_result_norm" else int(parts.value(tap).shape[-1])


def _check_embedding(parts: Parts) -> None:
    """Raises UnsupportedModel when the token embedding does not receive the token ids that the model is fed."""
    given = parts.probe.inputs.get(parts.embedding)
    if given is None or given.shape != parts.probe.ids.shape or not bool((given == parts.probe.ids).all()):
        raise UnsupportedModel(
            f"{parts.name}: its input embedding {parts.embedding} is given {None if given is None else list(given.shape)}, not the ids "
            f"{list(parts.probe.ids.shape)} that the model is fed, so that it cannot be seen which row is which token's."
        )


def _find_final_norm(parts: Parts) -> None:
    """The norm behind the last block. One that is used elsewhere, too, is read where the body of the model gives what it gave last."""
    norm, site, outputs = parts.norm, Site("final_norm"), parts.probe.outputs
    if norm is None:
        parts.missing[site] = _why_no_final_norm(parts)
    elif parts.probe.n_fired[norm] == 1:
        parts.taps[site] = Tap(norm, "output")
    elif parts.probe.n_fired[parts.owner] == 1 and is_sum(outputs[parts.owner], outputs[norm]):
        parts.taps[site] = Tap(parts.owner, "output")
    else:
        parts.missing[site] = (
            f"{norm} is used {parts.probe.n_fired[norm]} times in a forward, not once behind the last block"
        )


def _why_no_final_norm(parts: Parts) -> str:
    reason = f"no norm of a known name stands beside the blocks, only {parts.described(parts.owner)}"
    last = parts.blocks[len(parts.ran) - 1 - parts.ran[::-1].index(True)]
    given = parts.probe.inputs.get(parts.head or "")
    if given is not None and is_sum(given, parts.probe.outputs[last]):
        return f"{reason}; what the last block gives goes to the unembedding as it is"
    return reason

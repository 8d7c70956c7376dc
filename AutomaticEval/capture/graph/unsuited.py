"""Why a model, or one call of its `generate`, cannot be served from a graph.

Each reason has a name here, because what it names would be frozen in a graph, or cannot be recorded. What nobody thought of is found by
`self_check.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from AutomaticEval.capture.batch_independence import rope_limit
from AutomaticEval.capture.tree.shared_prompt import ONE_PASS
from AutomaticEval.capture.tree.suitability import ATTENTION_LAYERS, most_columns
from AutomaticEval.models.architecture.forward_call import cache_name
from AutomaticEval.models.architecture.inner_model import inner, is_compiled, virtual_tokens
from AutomaticEval.models.divided.division import n_processes
from AutomaticEval.models.edited_models import active_edits, depends_on_position
from AutomaticEval.models.hook_handles import module_of

OURS = ("AutomaticEval.models.recording", "AutomaticEval.models.editing")
"""The modules whose hooks are made for graphs."""
IDLE = ("transformers.utils.output_capturing",)
"""Modules whose hooks stay on a model and do nothing unless they are asked for."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names that configs give to the number of experts of a layer."""
NOT_SERVED = ("assistant_model", "custom_generate", "streamer", "synced_gpus", "inputs_embeds", "position_ids")
"""Arguments of `generate` that give it other steps, or other inputs."""


def why_not(model: Any, given: Mapping[str, Any]) -> str | None:
    """Why answers are not generated from a graph; None when no reason is known. given: the arguments for transformers' `generate`."""
    whole = inner(model)
    reasons = (_of_placing(whole), _of_kind(model), _of_layers(whole), _of_state(whole), _of_call(whole, given))
    return next((reason for reason in reasons if reason is not None), None)


def _of_placing(model: Any) -> str | None:
    """Of where the weights are, and how they are stored."""
    devices = {each.device for each in model.parameters()}
    if any(device.type == "meta" for device in devices) or "disk" in getattr(model, "hf_device_map", {}).values():
        return "its weights are offloaded."
    if len(devices) > 1:
        return f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})."
    if n_processes(model) > 1:
        return "its weights are divided among processes."
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_compileable", False):
        return (
            f"weights that are quantised by {getattr(model, 'quantization_method', 'this method')} cannot be recorded."
        )
    if torch.is_autocast_enabled(next(iter(devices)).type):
        return "autocast makes copies of the weights that do not live as long as a graph."
    return None


def _of_kind(model: Any) -> str | None:
    """Of what kind of model it is."""
    config = inner(model).config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder."
    tuned = virtual_tokens(model)
    if tuned is not None:
        return f"its adapter ({tuned.method}) puts tokens of its own before every sequence."
    if cache_name(model) is None:
        return "its forward takes no keys and values of earlier tokens."
    return None


def _of_layers(model: Any) -> str | None:
    """Of how its layers compute."""
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or layers - ATTENTION_LAYERS:
        return "its state is not keys and values of each token, and has no static form."
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"the mask of the attention {config._attn_implementation} grows with each token; that of sdpa and eager does not."
    if most_columns(model) is not None:
        return "its local attention goes by columns, whatever mask it is given (GPT-Neo)."
    if rope_limit(model) is not None:
        return "its rotary positions are computed anew by how long the text is (dynamic or long rope)."
    has_experts = any(getattr(config, name, None) for name in EXPERTS)
    if has_experts and getattr(config, "_experts_implementation", None) == "eager":
        return "which experts it runs is decided on the host (experts_implementation eager)."
    return None


def _of_state(model: nn.Module) -> str | None:
    """Of what was done to it: edits, hooks, compilation, training."""
    if model.training:
        return "it is in training mode."
    unfixed = [each.key for each in active_edits(model) if not each.edit.is_fixed]
    if unfixed:
        return f"the edit of {unfixed[0]} is a function of your own, which a graph would not call again."
    if depends_on_position(model):
        return "it is edited at certain rows or columns."
    return next((reason for module in model.modules() if (reason := _of_module(module)) is not None), _of_all_modules())


def _of_module(module: nn.Module) -> str | None:
    if is_compiled(module):
        return "a part of it is compiled."
    if "forward" in module.__dict__:
        return f"the forward of a {type(module).__name__} was replaced."
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        owner = module_of(hook)
        if owner not in (*OURS, *IDLE):
            return f"a hook of {owner or 'another owner'} is on a {type(module).__name__}; a graph would not call it again."
    return None


def _of_all_modules() -> str | None:
    """Of hooks that torch calls for every module there is."""
    every: Any = nn.modules.module
    return "hooks are on all modules." if every._global_forward_hooks or every._global_forward_pre_hooks else None


def _of_call(model: Any, given: Mapping[str, Any]) -> str | None:
    """Of one call of `generate`."""
    own = model.generation_config
    for name in NOT_SERVED:
        if given.get(name) is not None:
            return f"{name} was given."
    for name, plain in ONE_PASS.items():
        value = given.get(name, getattr(own, name, None))
        if value not in (None, plain) and (name, value) != (
            "cache_implementation",
            "hybrid",
        ):  # which transformers unsets
            return f"{name} is {value!r}."
    return None

"""`inner`: the module that runs in every way of calling a model, whatever the model was wrapped in.

A model with peft's adapters is a wrapper around a tuner around the model that the adapters were put into. That inner model alone runs in
`model(...)`, in `model.generate(...)`, and when it is called itself. So a model's hooks, lock, layout and edits are those of its inner model.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def inner(model: Any) -> Any:
    """The module whose forward gives the logits in every way of calling a model. Without adapters it is the model itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    owner = getattr(getattr(base, "generate", None), "__self__", None)  # peft's tuners hand on their model's generate
    is_within = owner is not base and any(owner is module for module in base.modules())
    return owner if is_within else base


def virtual_tokens(model: Any) -> str | None:
    """The name of the method when a model is tuned by tokens that are not fed (prompt tuning, prefix tuning, …); else None."""
    active = getattr(model, "active_peft_config", None)
    kind = getattr(active, "peft_type", None)
    return str(getattr(kind, "value", kind)) if getattr(active, "is_prompt_learning", False) else None


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile compiled a module. Hooks on such a module fire; hooks on modules within it fire only by chance."""
    if "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None:
        return True
    forwards = (module.__dict__.get(name, getattr(type(module), name, None)) for name in ("forward", "_old_forward"))
    return any(hasattr(each, "_torchdynamo_orig_callable") for each in forwards)  # _old_forward is accelerate's

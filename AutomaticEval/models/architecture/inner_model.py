"""`inner`: which module runs in every way of calling a model, whatever it was wrapped in.

peft's wrappers call the model that the adapters were put into, and their `generate` is that model's own: of the three, it alone runs in
`model(...)`, in `model.generate(...)` and when it is called itself. What is said of a model as a whole is said of it: its hooks, its lock,
its layout, its edits.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def inner(model: Any) -> Any:
    """The module whose forward gives the logits in every way of calling a model: the model itself, but for one with adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    owner = getattr(getattr(base, "generate", None), "__self__", None)  # peft's tuners hand on their model's generate
    is_within = owner is not base and any(owner is module for module in base.modules())
    return owner if is_within else base


def virtual_tokens(model: Any) -> str | None:
    """How a model is tuned by tokens that are not fed (prompt tuning, prefix tuning, …); None for others."""
    active = getattr(model, "active_peft_config", None)
    kind = getattr(active, "peft_type", None)
    return str(getattr(kind, "value", kind)) if getattr(active, "is_prompt_learning", False) else None


def is_compiled(module: nn.Module) -> bool:
    """By torch.compile. Hooks on it fire; hooks on what is in it do so only by chance."""
    return "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None

"""`inner`: the module that runs in every way of calling a model, whatever the model was wrapped in.

A model with peft's adapters is a wrapper around a tuner around the model that the adapters were put into. That inner model alone runs in
`model(...)`, in `model.generate(...)`, and when it is called itself. So a model's hooks, lock, layout and edits are those of its inner model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

BEFORE = ("PROMPT_TUNING", "P_TUNING")
"""The methods of peft that put the embeddings of virtual tokens before those of what is fed."""
IN_CACHE = ("PREFIX_TUNING",)
"""Those that put keys and values of virtual tokens into the cache."""


class Virtual(NamedTuple):
    """The tokens that a soft prompt puts before what is fed. They have no ids."""

    method: str
    """Prompt tuning, prefix tuning, …, as peft calls it."""
    n: int
    """How many there are."""

    @property
    def are_columns(self) -> bool:
        """Whether they are columns of the first forward, before those that are fed."""
        return self.method in BEFORE

    @property
    def are_cached(self) -> bool:
        """Whether they are keys and values alone, which no forward computes."""
        return self.method in IN_CACHE


def inner(model: Any) -> Any:
    """The module whose forward gives the logits in every way of calling a model. Without adapters it is the model itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    owner = getattr(getattr(base, "generate", None), "__self__", None)  # peft's tuners hand on their model's generate
    is_within = owner is not base and any(owner is module for module in base.modules())
    return owner if is_within else base


def virtual_tokens(model: Any) -> Virtual | None:
    """The virtual tokens of a model that is tuned by tokens that are not fed (prompt tuning, prefix tuning, …); else None.

    None, too, inside `with model.disable_adapter()`, where these tokens are left out.
    """
    if is_passed_by(model):
        return None
    active: Any = getattr(model, "active_peft_config", None)
    kind = getattr(active, "peft_type", None)
    if not getattr(active, "is_prompt_learning", False):
        return None
    return Virtual(str(getattr(kind, "value", kind)), int(active.num_virtual_tokens))


def is_passed_by(module: Any) -> bool:
    """Whether a soft prompt is switched off: then peft calls the forward of the base in place of the module's own."""
    forward = vars(module).get("forward")
    return getattr(forward, "__self__", module) is not module and not hasattr(module, "_hf_hook")


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile compiled a module. Hooks on such a module fire; hooks on modules within it fire only by chance."""
    if "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None:
        return True
    forwards = (module.__dict__.get(name, getattr(type(module), name, None)) for name in ("forward", "_old_forward"))
    return any(hasattr(each, "_torchdynamo_orig_callable") for each in forwards)  # _old_forward is accelerate's

"""Which adapters of a model are active, and `using_adapter`, which makes another one active for a while.

Knows models of peft, and models into which transformers put the adapters itself (`model.load_adapter`, `model.add_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from AutomaticEval.errors import ModelError
from AutomaticEval.models.architecture.forward_call import alone_with
from AutomaticEval.models.architecture.inner_model import is_passed_by

BASE = "base"
"""The word for the model without its adapters."""
STATE = (
    "_active_adapter",
    "active_adapter",
    "_disable_adapters",
    "_adapters_disabled",
    "forward",
    "prepare_inputs_for_generation",
)
"""The attributes of modules in which peft and transformers note what is active."""


def adapter_names(model: Any) -> list[str]:
    """The names of a model's adapters, whichever is active."""
    configs = getattr(model, "peft_config", None)
    return [str(name) for name in configs] if isinstance(configs, Mapping) else []


def active_names(model: Any) -> list[str]:
    """The adapters that take part in a forward now; several when their changes are added up. [] for a model without, or with all switched off."""
    names = adapter_names(model)
    if not names or is_passed_by(model) or any(vars(each).get("_disable_adapters") for each in model.modules()):
        return []
    active = getattr(model, "active_adapters", ())
    active = active() if callable(active) else active
    return [name for name in names if name in active]


@contextmanager
def using_adapter(model: Any, name: str | None) -> Iterator[Any]:
    """Inside the with, one of a model's adapters is active: the one of this name. Gives the model, which every function takes.

    model: a model of peft with one or several adapters, one that transformers put adapters into, or a LoadedModel of these. name: an adapter's
    name, "base" for the model without any, None for what is active already. Whatever happens inside, the model is left as it was found.
    Raises ModelError for a name that the model does not have, with those that it has, and for adapters that are merged into the weights.
    """
    if name is None:
        yield model
        return
    whole = model if isinstance(model, nn.Module) else model.model
    names = adapter_names(whole)
    if name not in names and (name != BASE or not names):
        has = f"it has {', '.join(names)}, and {BASE} for none of them" if names else "it has none"
        raise ModelError(f"{type(whole).__name__} has no adapter {name!r}; {has}.")
    with alone_with(whole), _left_as_found(whole):
        _refuse_merged(whole, name)
        if name in names:
            _activate(whole, name)
            yield model
        else:
            with _without(whole):
                yield model


def _refuse_merged(model: nn.Module, name: str) -> None:
    """Raises ModelError when adapters are merged into the weights, which then compute with them whatever is active."""
    merged = {each for module in model.modules() for each in getattr(module, "merged_adapters", None) or ()}
    if merged and merged != {name}:
        raise ModelError(
            f"adapter={name!r}: the weights are merged with {', '.join(sorted(merged))}, and taking that out again would round them. Call "
            "model.unmerge_adapter() first, or load the model anew."
        )


def _activate(model: Any, name: str) -> None:
    """Make one adapter active, and switch on adapters that were switched off."""
    if is_passed_by(model):
        raise ModelError(f"adapter={name!r}: all adapters are switched off (disable_adapter); leave that with first.")
    if active_names(model) == [name]:
        return
    for module in model.modules():
        if vars(module).get("_disable_adapters"):
            module.enable_adapters(True)  # type: ignore[operator]
    if hasattr(model, "_adapters_disabled"):
        model._adapters_disabled = False
    model.set_adapter(name)


@contextmanager
def _without(model: Any) -> Iterator[None]:
    """Inside the with, all adapters are switched off."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            if is_passed_by(model):  # peft calls the forward of the base, and none of the hooks on it
                model.forward = model.get_base_model().__call__
            yield
        return
    model.disable_adapters()
    yield


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Gives modules back what says which adapter is active, and weights whether they are trained, however the with ends."""
    modules = list(model.modules())
    before = [{name: vars(module)[name] for name in STATE if name in vars(module)} for module in modules]
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for module, state in zip(modules, before, strict=True):
            for name in STATE:
                vars(module).pop(name, None)
            vars(module).update(state)
        for weight, is_trained in trained:
            if weight.requires_grad != is_trained:
                weight.requires_grad_(is_trained)

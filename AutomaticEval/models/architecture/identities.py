"""One small forward whose inputs and outputs are all kept, and the test whether a tensor is the sum of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from AutomaticEval.errors import UnsupportedModel, first_line
from AutomaticEval.models.architecture.forward_call import cache_in, few_ids, input_of, tensor_of, with_cache
from AutomaticEval.models.described.stand_ins import draws_so_far
from AutomaticEval.models.hook_handles import Hooks

PROBE_LENGTH = 6
"""Tokens of the small forward."""


class Call(NamedTuple):
    """All that a module was called with, and all that it gave."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    draws: Tensor | None
    """What `repeating` needs, so that the module gives the same once more. None with weights."""


class Probe:
    """What some modules of a model are given, and what they give, in one forward over PROBE_LENGTH tokens.

    model: the model as people call it. modules: path -> module, anywhere in it. in_full: the paths of those whose whole calls are kept, too.
    """

    def __init__(self, model: Any, modules: Mapping[str, nn.Module], in_full: Collection[str] = ()) -> None:
        self.inputs: dict[str, Tensor] = {}
        """Path -> what the module is given."""
        self.outputs: dict[str, Tensor] = {}
        """Path -> what the module gives."""
        self.calls: dict[str, Call] = {}
        """Path -> the module's last call, of the modules of `in_full`."""
        self.n_fired: Counter[str] = Counter()
        """Path -> how often the module ran."""
        self.returned: list[Tensor] = []
        """All tensors that the model returns."""

        draws: dict[str, Tensor | None] = {}

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                value = input_of(args, kwargs)
                if value is not None:
                    self.inputs[name] = value.detach().clone()
                if name in in_full:
                    draws[name] = draws_so_far()

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self.n_fired[name] += 1
                if not name:
                    self.returned = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
                if name in in_full:
                    self.calls[name] = Call(_copied(args), _copied(kwargs), _copied(output), draws.get(name))
                value = tensor_of(output)
                if value is not None:
                    self.outputs[name] = value.detach().clone()

            return hook

        self.ids = ids = few_ids(model, PROBE_LENGTH)
        with Hooks() as hooks, torch.no_grad():
            for name, module in modules.items():
                hooks.before(module, before(name))
                hooks.after(module, after(name), with_kwargs=True)
            try:
                out = model(input_ids=ids, **with_cache(model))
            except (TypeError, ValueError) as failure:  # as of models that must see an image
                raise UnsupportedModel(
                    f"{type(model).__name__} cannot run over token ids alone, and so is neither asked nor captured: {first_line(failure)}"
                ) from failure
        layers = getattr(cache_in(out), "layers", [])
        self.keys = [getattr(layer, "keys", None) for layer in layers]
        """The keys in the cache, layer by layer, like `values`."""
        self.values = [getattr(layer, "values", None) for layer in layers]
        """The values in the cache, layer by layer: each [1, n_kv_heads, pos, d_head], or None."""


def _copied(value: Any) -> Any:
    """A value, and what a tuple or dict holds, with tensors as copies."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return tuple(_copied(each) for each in value)
    return {name: _copied(each) for name, each in value.items()} if isinstance(value, dict) else value


def is_sum(total: Tensor, *terms: Tensor) -> bool:
    """Whether a tensor is the sum of the terms, except for rounding in its dtype. False when the shapes differ."""
    terms = tuple(term.to(total.device) for term in terms)
    if any(term.shape != total.shape for term in terms):
        return False
    expected, size = torch.zeros_like(total, dtype=torch.float64), torch.zeros_like(total, dtype=torch.float64)
    for term in terms:
        expected += term.double()
        size += term.double().abs()
    slack = 8 * torch.finfo(total.dtype).eps * size + 1e-12
    close = (total.double() - expected).abs() <= slack
    return close.double().mean().item() > 0.99

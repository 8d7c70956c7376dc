"""One small forward whose inputs and outputs are all kept, and the test whether a tensor is the sum of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.errors import UnsupportedModel, first_line
from AutomaticEval.models.architecture.forward_call import cache_in, few_ids, input_of, tensor_of
from AutomaticEval.models.hook_handles import Hooks

PROBE_LENGTH = 6
"""Tokens of the small forward."""


class Probe:
    """What some modules of a model are given, and what they give, in one forward over PROBE_LENGTH tokens.

    model: the model as people call it. modules: path -> module, anywhere in it.
    """

    def __init__(self, model: Any, modules: Mapping[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        """Path -> what the module is given."""
        self.outputs: dict[str, Tensor] = {}
        """Path -> what the module gives."""
        self.n_fired: Counter[str] = Counter()
        """Path -> how often the module ran."""

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                value = input_of(args, kwargs)
                if value is not None:
                    self.inputs[name] = value.detach().clone()

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                self.n_fired[name] += 1
                value = tensor_of(output)
                if value is not None:
                    self.outputs[name] = value.detach().clone()

            return hook

        self.ids = ids = few_ids(model, PROBE_LENGTH)
        with Hooks() as hooks, torch.no_grad():
            for name, module in modules.items():
                hooks.before(module, before(name))
                hooks.after(module, after(name))
            try:
                out = model(input_ids=ids, use_cache=True)
            except (TypeError, ValueError) as failure:  # as of models that must see an image
                raise UnsupportedModel(
                    f"{type(model).__name__} cannot run over token ids alone, and so is neither asked nor captured: {first_line(failure)}"
                ) from failure
        layers = getattr(cache_in(out), "layers", [])
        self.values = [getattr(layer, "values", None) for layer in layers]
        """The values in the cache, layer by layer: each [1, n_kv_heads, pos, d_head], or None."""


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

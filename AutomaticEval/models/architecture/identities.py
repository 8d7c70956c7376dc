"""One small forward that is looked at everywhere, and the question whether a tensor is the sum of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.models.architecture.forward_call import cache_in, few_ids, input_of, tensor_of
from AutomaticEval.models.hook_handles import Hooks

PROBE_LENGTH = 6


class Probe:
    """The inputs and outputs of every module of interest in one forward over PROBE_LENGTH tokens.

    model: as people call it. modules: path -> module, anywhere in it.
    """

    def __init__(self, model: Any, modules: Mapping[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.n_fired: Counter[str] = Counter()

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
            out = model(input_ids=ids, use_cache=True)
        layers = getattr(cache_in(out), "layers", [])
        self.values = [getattr(layer, "values", None) for layer in layers]  # each [1, n_kv_heads, pos, d_head]


def is_sum(found: Tensor, *terms: Tensor) -> bool:
    """Whether found is the sum of the terms, but for rounding in their dtype."""
    terms = tuple(term.to(found.device) for term in terms)
    if any(term.shape != found.shape for term in terms):
        return False
    total, size = torch.zeros_like(found, dtype=torch.float64), torch.zeros_like(found, dtype=torch.float64)
    for term in terms:
        total += term.double()
        size += term.double().abs()
    slack = 8 * torch.finfo(found.dtype).eps * size + 1e-12
    close = (found.double() - total).abs() <= slack
    return close.double().mean().item() > 0.99

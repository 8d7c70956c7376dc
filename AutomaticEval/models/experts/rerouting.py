"""A router's forward, run once more with other logits: what the router chooses then, by its own rule.

Routers compute their logits, their softmax or sigmoid, and their choice in one forward. So logits can only be changed within it: at the one
operation that gives a number for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from AutomaticEval.errors import EditError

_PRODUCTS = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm")
"""The operations of torch, by name, that give logits."""
_CHOICES = ("topk",)
"""Those that choose experts."""


def rerouted(
    router: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    n_experts: int,
    change: Callable[[Tensor], Tensor],
) -> Any:
    """What a router gives when its logits are changed.

    change: takes the logits [..., n_experts], and gives new ones of the same shape. An expert whose new logit is -inf is not chosen.
    Raises EditError when the router does not compute logits by one product, and when it chooses such an expert all the same.
    """
    mode = _Rerouting(n_experts, change)
    with mode:
        output = router.forward(*args, **kwargs)
    if mode.n_products != 1:
        raise EditError(
            f"the router {type(router).__name__} computes {mode.n_products} products with {n_experts} features, one for each expert; one was "
            "expected, so that its logits are not known."
        )
    return output


def refuse_barred(output: Any, logits: Tensor) -> None:
    """Raises EditError when a router chose experts whose logits are -inf: then it chooses by something else, as DeepSeek V4's first layers do.

    output: what the router gave. logits: [tokens, n_experts], with which it ran.
    """
    is_barred = logits.isneginf().view(-1, logits.shape[-1])
    if not isinstance(output, tuple) or not bool(is_barred.any()):
        return
    for ids in output:
        is_choice = isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == len(is_barred)
        if is_choice and not ids.is_floating_point() and bool(is_barred.gather(-1, ids.long()).any()):
            raise EditError(
                "a router chooses experts whose logits are -inf: it does not choose by its logits (but by a table of tokens, say), so that no expert "
                "can be dropped there."
            )


class _Rerouting(TorchFunctionMode):
    """Changes the result of the product that gives logits, and keeps choices away from experts whose logits are -inf."""

    def __init__(self, n_experts: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n_products = 0
        self._n_experts, self._change = n_experts, change
        self._is_barred: Tensor | None = None
        """[tokens, n_experts]: the experts that a token may not have; None when each may have all."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _CHOICES and self._is_barred is not None and args[0].shape[-1] == self._n_experts:
            return self._chosen(func, args, kwargs, self._is_barred)
        output = func(*args, **kwargs)
        if name not in _PRODUCTS or not isinstance(output, Tensor) or output.shape[-1] != self._n_experts:
            return output
        self.n_products += 1
        output = self._change(output)
        is_barred = output.isneginf().view(-1, self._n_experts)
        self._is_barred = is_barred if bool(is_barred.any()) else None
        return output

    def _chosen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_barred: Tensor) -> Any:
        """A choice among scores [tokens, n_experts]. A score may hold a bias beside the logit, and would not be -inf without this."""
        is_barred = is_barred.view(args[0].shape)
        found = func(args[0].masked_fill(is_barred, -torch.inf), *args[1:], **kwargs)
        if bool(is_barred.gather(-1, found[1]).any()):
            raise EditError(
                "a router has to choose an expert whose logit is -inf: too few others are left (in the groups of experts that it chooses from). "
                "Drop fewer."
            )
        return found

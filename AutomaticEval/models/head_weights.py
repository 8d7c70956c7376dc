"""What a head computes: its slice z_h of the input of the output projection of attention, and its result z_h W_O^h."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from AutomaticEval.errors import SiteUnavailable

ROUNDING = 0.05
"""How far the output of a projection may be from z W_O + b_O, as a part of its size. LLM.int8 rounds the input of a projection, too."""


def output_weight(projection: nn.Module) -> Tensor:
    """W_O of an output projection, [n_heads * d_head, d_model], float32: `projection(z) = z W_O + b_O`.

    The weight of a quantised or offloaded projection is what it gives for the identity matrix.
    """
    with torch.no_grad():
        weight: Any = projection.weight
        if is_plain(projection):
            plain: Tensor = weight.float().T if type(projection) is nn.Linear else weight.float()
            return plain.detach()
        identity: Any = torch.eye(n_inputs(projection), dtype=_dtype(projection), device=_device(projection))
        bias = projection.forward(torch.zeros_like(identity[:1]))
        without_bias: Tensor = projection.forward(identity).float() - bias.float()
        return without_bias


def is_plain(projection: nn.Module) -> bool:
    """Whether the weight of a projection can be read as it is: it is neither adapted, quantised nor offloaded."""
    weight: Any = projection.weight
    is_tensor = type(weight) in (Tensor, nn.Parameter)  # torchao's are classes of their own
    return type(projection) in (nn.Linear, Conv1D) and is_tensor and not weight.is_meta and weight.dtype.itemsize > 1


def n_inputs(projection: nn.Module) -> int:
    """The width of the input of a projection, n_heads * d_head. Raises TypeError for a module that does not say it."""
    for name in ("in_features", "nx"):
        if isinstance(getattr(projection, name, None), int):
            return int(getattr(projection, name))
    raise TypeError(
        f"{type(projection).__name__} says neither in_features nor nx: how many inputs it has is not known."
    )


def _dtype(projection: nn.Module) -> torch.dtype:
    """The dtype of inputs of a projection. Quantised weights convert their input, and take float32."""
    weight: Any = projection.weight
    return weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else torch.float32


def _device(projection: nn.Module) -> torch.device:
    device: torch.device = projection.weight.device  # type: ignore[assignment, union-attr]
    return torch.device("cpu") if device.type == "meta" else device


def head_results(z: Tensor, projection: nn.Module, n_heads: int) -> Tensor:
    """The result of each head: [..., n_heads, d_model], float32. z: [..., n_heads * d_head].

    The sum of the results and b_O is the output of the projection.
    """
    weight = output_weight(projection).to(z.device)
    split = z.float().unflatten(-1, (n_heads, -1))  # type: ignore[no-untyped-call]
    results: Tensor = torch.einsum("...hd,hdm->...hm", split, weight.view(n_heads, -1, weight.shape[1]))
    return results


class HeadResultNorms:
    """Turns z [..., n_heads * d_head] into the L2 norm of the result of each head [..., n_heads], float32.

    The norms are exact, and cost d_model / d_head times less than the results: with W_O^h = R^T Q^T and orthonormal Q,
    ‖z_h W_O^h‖ = ‖z_h R^T‖.
    """

    def __init__(self, n_heads: int) -> None:
        self._n_heads = n_heads
        self._projection: nn.Module | None = None
        self._factors: dict[torch.device, Tensor] = {}
        self._marks: Tensor | None = None
        self._n_dropped = 0
        """How many times the factors were dropped."""

    @property
    def mark(self) -> Hashable:
        """Another one once the factors are dropped."""
        return self, self._n_dropped

    def refresh(self, projection: nn.Module) -> None:
        """Call this before a forward. It drops the factors when the projection is another one or its weights have changed, as by training."""
        marks = _marks_of(projection)
        is_same_module = projection is self._projection
        has_same_weights = marks is not None and self._marks is not None and torch.equal(marks, self._marks)
        if not (is_same_module and has_same_weights):
            self._projection, self._factors, self._marks = projection, {}, marks
            self._n_dropped += 1

    def __call__(self, z: Tensor) -> Tensor:
        if z.device not in self._factors:
            self._factors[z.device] = self._factored().to(z.device)
        split = z.float().unflatten(-1, (self._n_heads, -1))  # type: ignore[no-untyped-call]
        norms: Tensor = torch.einsum("...hd,hkd->...hk", split, self._factors[z.device]).norm(dim=-1)
        return norms

    def _factored(self) -> Tensor:
        """[n_heads, d_head, d_head]: the factor R of each head. Raises SiteUnavailable."""
        if self._projection is None:
            raise SiteUnavailable("head_result_norm was asked for outside a capture, so its projection is not known.")
        weight = output_weight(self._projection).cpu()
        _check(self._projection, weight)
        by_head = weight.view(self._n_heads, -1, weight.shape[1])  # [n_heads, d_head, d_model]
        factors: Tensor = torch.linalg.qr(by_head.transpose(1, 2).double(), mode="r").R.float()
        return factors


def _marks_of(projection: nn.Module) -> Tensor | None:
    """[d_in, 2]: two numbers for each input of a plain projection, which change when its weights change.

    None for adapted, quantised and offloaded projections, whose weights cannot be compared so.
    """
    weight: Any = projection.weight
    if not is_plain(projection):
        return None
    with torch.no_grad():
        by_input = weight.T if type(projection) is nn.Linear else weight
        directions = torch.randn(by_input.shape[1], 2, generator=torch.Generator().manual_seed(0))
        marks: Tensor = (by_input.float() @ directions.to(by_input.device)).cpu()
        return marks


def _check(module: nn.Module, weight: Tensor) -> None:
    """Raises SiteUnavailable when a projection does not give z W_O + b_O, because of an adapter or of quantisation."""
    z = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    inputs: Any = torch.cat([z, torch.zeros_like(z[:1])]).to(_device(module), _dtype(module))
    with torch.no_grad():
        out = module.forward(inputs).float().cpu()
    off, size = float((out[:4] - out[4:] - z @ weight).norm()), float(out[:4].norm())
    if not off <= ROUNDING * size:
        raise SiteUnavailable(
            f"head_result_norm: {type(module).__name__} gives results that are {off / size:.3f} off those of its weights, so what each head adds "
            "is not known. Keep z instead."
        )

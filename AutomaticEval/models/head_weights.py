"""What a head is: its slice z_h of the input of attention's output projection, and its result z_h W_O^h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from AutomaticEval.errors import SiteUnavailable

ROUNDING = 0.05
"""How far, as a part of what it gives, a projection may be off z W_O + b_O: LLM.int8 rounds what it is given, too."""


def output_weight(projection: nn.Module) -> Tensor:
    """W_O of an output projection, [n_heads * d_head, d_model], float32: `projection(z) = z W_O + b_O`.

    Of a quantised or offloaded projection it is found by giving it the identity.
    """
    with torch.no_grad():
        weight: Any = projection.weight
        if type(projection) in (nn.Linear, Conv1D) and not weight.is_meta:
            plain: Tensor = weight.float().T if type(projection) is nn.Linear else weight.float()
            return plain.detach()
        given: Any = torch.eye(n_inputs(projection), dtype=_dtype(projection), device=_device(projection))
        nothing = projection.forward(torch.zeros_like(given[:1]))
        found: Tensor = projection.forward(given).float() - nothing.float()
        return found


def n_inputs(projection: nn.Module) -> int:
    for name in ("in_features", "nx"):
        if isinstance(getattr(projection, name, None), int):
            return int(getattr(projection, name))
    raise TypeError(
        f"{type(projection).__name__} says neither in_features nor nx: how many inputs it has is not known."
    )


def _dtype(projection: nn.Module) -> torch.dtype:
    """The dtype that the projection takes as input. Quantised weights convert their input: float32."""
    weight: Any = projection.weight
    return weight.dtype if weight.is_floating_point() else torch.float32


def _device(projection: nn.Module) -> torch.device:
    device: torch.device = projection.weight.device  # type: ignore[assignment, union-attr]
    return torch.device("cpu") if device.type == "meta" else device


def head_results(z: Tensor, projection: nn.Module, n_heads: int) -> Tensor:
    """z: [..., n_heads * d_head]. Returns [..., n_heads, d_model], float32; their sum and b_O are what the projection gives."""
    weight = output_weight(projection).to(z.device)
    split = z.float().unflatten(-1, (n_heads, -1))  # type: ignore[no-untyped-call]
    found: Tensor = torch.einsum("...hd,hdm->...hm", split, weight.view(n_heads, -1, weight.shape[1]))
    return found


class HeadResultNorms:
    """z [..., n_heads * d_head] to the L2 norm of each head's result [..., n_heads], float32.

    Exact, and d_model / d_head times cheaper than the results: with W_O^h = R^T Q^T and orthonormal Q, ‖z_h W_O^h‖ = ‖z_h R^T‖.
    """

    def __init__(self, n_heads: int) -> None:
        self._n_heads = n_heads
        self._projection: nn.Module | None = None
        self._factors: dict[torch.device, Tensor] = {}
        self._of: Tensor | None = None

    def refresh(self, projection: nn.Module) -> None:
        """Before a forward: factors are kept only as long as projection and weights are the same, which training may have changed."""
        told = _told(projection)
        is_same = (
            told is not None and self._of is not None and projection is self._projection and torch.equal(told, self._of)
        )
        if not is_same:
            self._projection, self._factors, self._of = projection, {}, told

    def __call__(self, z: Tensor) -> Tensor:
        if z.device not in self._factors:
            self._factors[z.device] = self._factored().to(z.device)
        split = z.float().unflatten(-1, (self._n_heads, -1))  # type: ignore[no-untyped-call]
        found: Tensor = torch.einsum("...hd,hkd->...hk", split, self._factors[z.device]).norm(dim=-1)
        return found

    def _factored(self) -> Tensor:
        """R of each head: [n_heads, d_head, d_head]."""
        if self._projection is None:
            raise SiteUnavailable("head_result_norm was asked for outside a capture, so its projection is not known.")
        weight = output_weight(self._projection).cpu()
        _check(self._projection, weight)
        by_head = weight.view(self._n_heads, -1, weight.shape[1])  # [n_heads, d_head, d_model]
        found: Tensor = torch.linalg.qr(by_head.transpose(1, 2).double(), mode="r").R.float()
        return found


def _told(projection: nn.Module) -> Tensor | None:
    """[d_in, 2]: two numbers for each input of a plain projection, which change when its weights change. None for adapted, quantised and offloaded projections."""
    weight: Any = projection.weight
    if type(projection) not in (nn.Linear, Conv1D) or weight.is_meta:
        return None
    with torch.no_grad():
        by_input = weight.T if type(projection) is nn.Linear else weight
        directions = torch.randn(by_input.shape[1], 2, generator=torch.Generator().manual_seed(0))
        found: Tensor = (by_input.float() @ directions.to(by_input.device)).cpu()
        return found


def _check(module: nn.Module, weight: Tensor) -> None:
    """Raises SiteUnavailable when a projection does not do what its weights say."""
    z = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    given: Any = torch.cat([z, torch.zeros_like(z[:1])]).to(_device(module), _dtype(module))
    with torch.no_grad():
        out = module.forward(given).float().cpu()
    off, size = float((out[:4] - out[4:] - z @ weight).norm()), float(out[:4].norm())
    if not off <= ROUNDING * size:
        raise SiteUnavailable(
            f"head_result_norm: {type(module).__name__} gives results that are {off / size:.3f} off its weights', so what each head adds "
            "is not known. Keep z instead."
        )

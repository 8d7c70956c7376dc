"""What is computed of a router's choice for the sites of experts: ids and weights in the order of the weights, and each chosen expert's output.

Each looks at one row alone, as `layout.Derived` says. "Chosen" rows are [..., 2 * n_active]: ids, then weights, as the experts are given them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable


class Chosen(NamedTuple):
    """The experts of each token, those with the largest weight first: both [..., n_active]."""

    ids: Tensor
    """int64"""
    weights: Tensor


def in_order(ids: Tensor, weights: Tensor) -> Chosen:
    """The chosen experts in the order of their weights. Equal weights stay in the router's order."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return Chosen(ids.gather(-1, order).long(), weights.gather(-1, order))


class _Plain:
    """Computes the same for every module that is read."""

    @property
    def mark(self) -> Hashable:
        """The fields."""
        return self

    def refresh(self, module: nn.Module) -> None:
        """Nothing is remembered of the module."""


@dataclass(frozen=True)
class _OfChosen(_Plain):
    """Ids or weights of the experts that a token has."""

    gives: str
    """ids or weights."""
    n_active: int
    dtype: torch.dtype
    """Of what is given."""


class FromChoice(_OfChosen):
    """Chosen rows to ids or weights."""

    def __call__(self, value: Tensor) -> Tensor:
        chosen = in_order(*value.split(self.n_active, -1))  # type: ignore[no-untyped-call]
        given: Tensor = getattr(chosen, self.gives)
        return given.to(self.dtype)


class FromLogits(_OfChosen):
    """Logits to the ids of the largest, or to their softmax: for routers that give neither."""

    def __call__(self, value: Tensor) -> Tensor:
        top = value.topk(self.n_active, dim=-1)
        given = top.indices if self.gives == "ids" else torch.softmax(top.values, dim=-1)
        return given.to(self.dtype)


@dataclass(eq=False)
class ExpertOutputs:
    """The weighted output of each chosen expert: [..., d_model + 2 * n_active] to [..., n_active * d_model].

    A row is what the experts are given: a hidden state, then ids and weights. The layer's own module of experts is given each place as a row of its own.
    """

    n_active: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    """Of the hidden state, the ids and the weights, as the module is given them."""
    names: Sequence[str]
    """The names of the arguments that the module is given by name; the others come before them."""
    _experts: nn.Module | None = field(default=None, repr=False)

    @property
    def mark(self) -> Hashable:
        """Itself: it runs one module."""
        return self

    def refresh(self, module: nn.Module) -> None:
        """Call this before a forward, with the module of experts."""
        self._experts = module

    def __call__(self, value: Tensor) -> Tensor:
        if self._experts is None:
            raise SiteUnavailable("expert_out was asked for outside a capture, so that its experts are not known.")
        rows = value.reshape(-1, value.shape[-1])
        hidden, ids, weights = rows.split([value.shape[-1] - 2 * self.n_active, self.n_active, self.n_active], -1)  # type: ignore[no-untyped-call]
        chosen = in_order(ids, weights)
        width = self.n_active * hidden.shape[-1]
        if not len(rows):
            none: Tensor = hidden.new_empty((*value.shape[:-1], width), dtype=self.dtypes[0])
            return none
        with torch.no_grad():
            outputs = self._one_by_one(hidden, chosen)  # [n, n_active, d_model]
        return outputs.reshape(*value.shape[:-1], width)

    def _one_by_one(self, hidden: Tensor, chosen: Chosen) -> Tensor:
        """What the experts give when each token has but its expert of one place: [n, n_active, d_model]. All places are rows of one call."""
        given = (hidden.repeat_interleave(self.n_active, 0), chosen.ids.reshape(-1, 1), chosen.weights.reshape(-1, 1))
        converted = [each.to(dtype) for each, dtype in zip(given, self.dtypes, strict=True)]
        n_by_position = len(converted) - len(self.names)
        by_name = dict(zip(self.names, converted[n_by_position:], strict=True))
        assert self._experts is not None
        # forward, without hooks: this is no forward of the model
        output: Tensor = self._experts.forward(*converted[:n_by_position], **by_name)
        return output.view(len(hidden), self.n_active, -1)

"""Recomputed rows, reduced as those of a run were. It shares no code with the capture, so that it can show what that got wrong."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from AutomaticEval.errors import OtherSettings
from AutomaticEval.store.run import Run


class ReducedAgain:
    """Reduces whole rows of a sample as a run did. Raises OtherSettings for a reduction that this version does not know."""

    def __init__(self, run: Run) -> None:
        self._name = run.made_with.reduce
        self.is_by_sample = run.contents.is_by_sample
        """Whether all rows of a sample become one line."""
        if self._name not in (None, "norm", "project", "mean", "max"):
            raise OtherSettings(f"{run.path} was reduced by {self._name!r}, which this version cannot recompute.")
        self._matrices: Mapping[str, Tensor] = (
            {key: run.projection(key).double() for key in run.keys} if self._name == "project" else {}
        )

    @property
    def is_reducing(self) -> bool:
        return self._name is not None

    def of(self, key: str, rows: Tensor) -> Tensor:
        """Rows [n, width] as they would be stored: [n, k], or [1, width] for one line a sample; float32 when they are reduced."""
        if self._name is None:
            return rows
        wide = rows.double()
        if self._name == "norm":
            return (wide * wide).sum(1, keepdim=True).sqrt().float()
        if self._name == "project":
            return torch.einsum("nd,dk->nk", wide, self._matrices[key]).float()
        if not len(wide):
            return torch.full((1, wide.shape[1]), torch.nan)
        return (wide.mean(0, keepdim=True) if self._name == "mean" else wide.max(0, keepdim=True).values).float()

    def sizes(self, key: str, rows: Tensor) -> Tensor | None:
        """[n, k]: the size against which differences of projected rows are judged; None: that of the numbers themselves.

        A projection may cancel to almost nothing while its terms do not. Its rounding is that of the terms: their root sum of squares.
        """
        if self._name != "project":
            return None
        return (rows.double().square() @ self._matrices[key].square()).sqrt()

"""Which positions of a forward are kept, and their rows in what a hook sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.transfer.ring import on_device


class Kept(NamedTuple):
    """Which (batch row, column) pairs of one forward are kept. Both tensors are [n_kept], int64."""

    rows: Tensor
    columns: Tensor


@dataclass
class Forward:
    """The current forward, and what is kept of it."""

    kept: Kept
    """On the CPU."""
    first: int
    """The first column that is fed."""
    n_columns: int
    is_whole: bool
    """Whether every position is kept, row after row."""
    step: int | None = None
    """The number of the forward among the steps whose rows land together; None when they land alone."""
    _on_device: dict[tuple[torch.device, int], Kept] = field(default_factory=dict)

    def on(self, device: torch.device, first: int) -> Kept:
        """The pairs, on a device, with columns counted from column `first` on."""
        if (device, first) not in self._on_device:
            counted = Kept(self.kept.rows, self.kept.columns - first)
            self._on_device[device, first] = Kept(*(on_device(each, device) for each in counted))
        return self._on_device[device, first]

    def cut(self, key: str, value: Tensor) -> Tensor:
        """The kept rows of a value [batch, columns, width]: [n_kept, width]. A view of it where every position is kept.

        Raises CaptureError when the value lacks columns that are kept.
        """
        lacking = self.n_columns - value.shape[1]  # logits are computed for the last columns only
        if self.is_whole and not lacking:
            return value.flatten(0, 1)
        n_absent = int((self.kept.columns < self.first + lacking).sum()) if lacking else 0
        if n_absent:
            raise CaptureError(
                f"{key} was not computed at {n_absent} of the positions asked for: a model that generates computes it, of the "
                'prompt, for the last token only (logits, and layers that share their keys and values). Use positions="scored".'
            )
        rows, columns = self.on(value.device, self.first + lacking)
        return value[rows, columns]


def is_whole(kept: Kept, first: int, n_columns: int, n_rows: int) -> bool:
    """Whether every position of a forward is kept, row after row."""
    n_positions = n_rows * n_columns
    if len(kept.rows) != n_positions:
        return False
    return torch.equal(kept.rows * n_columns + kept.columns - first, torch.arange(n_positions))

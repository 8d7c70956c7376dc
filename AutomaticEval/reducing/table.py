"""The table of reductions: how the rows of a site are made smaller before they are kept.

A reduction of rows makes each row [width] a shorter one, and needs nothing but the row. A reduction of samples makes one line [width] of all
rows that are kept of a sample. A new reduction is a row of the table. This file knows no sites, models or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowReduction:
    """What is kept of one row."""

    name: str
    meaning: str
    """What a stored row holds, in words."""

    width: Callable[[Tensor | None], int]
    """The width of a reduced row. Takes the site's matrix, or None for a reduction without matrices."""

    reduced: Callable[[Tensor, Tensor | None], Tensor]
    """Rows [..., width] and the site's matrix -> reduced rows [..., k], float32."""


@dataclass(frozen=True)
class SampleReduction:
    """What is kept of all rows of one sample. Rows come in parts, because samples share some of them."""

    name: str
    meaning: str
    """What a stored line holds, in words."""

    of_part: Callable[[Tensor], Tensor]
    """Rows [n, width], float32 -> [width]; n is 1 at least."""

    of_parts: Callable[[Tensor, int], Tensor]
    """What `of_part` gave of each part [n_parts, width], and the number of all rows -> [width]."""


Reduction = RowReduction | SampleReduction


def _projected(rows: Tensor, matrix: Tensor | None) -> Tensor:
    import torch

    assert matrix is not None
    with torch.autocast(rows.device.type, enabled=False):  # which would multiply in 16 bits
        return rows.float() @ matrix


def _columns(matrix: Tensor | None) -> int:
    assert matrix is not None
    return matrix.shape[1]


PROJECT = "project"
"""The name of the reduction by matrices, which are given by themselves."""
_TABLE: tuple[Reduction, ...] = (
    RowReduction(
        "norm", "the L2 norm of the row", lambda _: 1, lambda rows, _: rows.float().norm(dim=-1, keepdim=True)
    ),
    RowReduction(PROJECT, "the row times a matrix", _columns, _projected),
    SampleReduction(
        "mean",
        "the mean over the sample's kept positions",
        lambda rows: rows.sum(0),
        lambda parts, n_rows: parts.sum(0) / n_rows,
    ),
    SampleReduction(
        "max",
        "the largest number of each feature over the sample's kept positions",
        lambda rows: rows.amax(0),
        lambda parts, _: parts.amax(0),
    ),
)
REDUCTIONS = {each.name: each for each in _TABLE}
NAMED = tuple(name for name in REDUCTIONS if name != PROJECT)
"""The reductions that people ask for by name."""


def is_by_sample(name: str | None) -> bool:
    """Whether a run with this setting `reduce` holds one line a sample, in the place of rows. None: nothing is reduced."""
    return isinstance(REDUCTIONS.get(name or ""), SampleReduction)

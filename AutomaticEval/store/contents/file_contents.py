"""What one file holds, whether it is made of samples in memory or read from files.

Activations come slab by slab and are never gathered. Knows nothing of HDF5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from AutomaticEval.reducing.table import is_by_sample
from AutomaticEval.samples import RowFormat as RowFormat
from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.ragged import Array, Ragged


@dataclass(frozen=True)
class Activation:
    """The rows of one site.

    A slab is some of them that follow one another, as an array. All slabs, one after the other, are all rows.
    """

    dtype: torch.dtype
    """The dtype in which the numbers are stored. int8 has scales."""

    width: int
    slabs: Callable[[], Iterator[Array]]
    """Gives all rows as slabs [n, width] of raw bits."""

    scales: Callable[[], Iterator[Array]] | None = None
    """For int8: gives all scales as slabs [n, width], float32, one line a block of rows."""

    @property
    def read_as(self) -> torch.dtype:
        """The dtype in which rows are given back: float32 for int8."""
        return RowFormat(self.dtype, self.width).read_as


@dataclass(frozen=True)
class Contents:
    """One file's worth of samples with their rows."""

    model: str
    settings: Mapping[str, Any]
    token_ids: Any
    """[n_rows]: an array, or an object that is sliced like one. So are positions and blocks."""

    positions: Any
    """[n_rows]: the position of each row in its sequence."""

    blocks: Any
    """[n_rows]: each row's line in the scales. None without int8 activations."""

    segments: Ragged
    """[n_segments, 2]: for each sample the half-open ranges of its rows."""

    input_ids: Ragged
    generated_ids: Ragged
    strings: Callable[[], Mapping[int, str]]
    """Gives the string of every token id that a row has."""

    columns: Columns
    activations: Mapping[str, Activation]
    matrices: Mapping[str, Any] = field(default_factory=dict)
    """Of a projection: name -> [width, k], float32; of edits: `edits/<digest>` -> [n, width], float64. Arrays, or objects that are sliced like one."""

    @property
    def is_by_sample(self) -> bool:
        """Whether each sample has one line in the place of rows. Its token and position are then NO_TOKEN and NO_POSITION."""
        return is_by_sample(self.settings.get("reduce"))

    @property
    def n_samples(self) -> int:
        return len(self.segments.offset) - 1

    def fed(self, sample: int) -> tuple[list[int], list[int]]:
        """The token id and the position of each row of a sample."""
        ranges = self.segments.item(sample)
        token_ids, positions = (
            [int(value) for start, stop in ranges for value in each[start:stop]]
            for each in (self.token_ids, self.positions)
        )
        return token_ids, positions

    @property
    def n_rows(self) -> int:
        return len(self.token_ids)

"""Samples of which one line is kept in the place of their rows: the mean or the largest numbers over their kept positions.

A sample's positions may lie in several blocks of rows, which it shares with other samples, and a response's end is known only after its
forwards. So this is computed on the CPU, as soon as a sample's rows are known, and its rows are then dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from AutomaticEval.reducing.table import SampleReduction
from AutomaticEval.samples import Line, Part, Rows, Sample
from AutomaticEval.selection import Selection
from AutomaticEval.store.contents.changed import narrowed
from AutomaticEval.store.hdf5.contract import dtype_named


class SampleReducer:
    """Gives samples as the selection keeps them. Each part of shared rows is added up once, while its rows are in memory."""

    def __init__(self, selection: Selection | None) -> None:
        reduction = None if selection is None else selection.reduction
        self._reduction = reduction if isinstance(reduction, SampleReduction) else None
        name = None if selection is None else selection.store_dtype
        self._dtype = torch.float32 if name is None else dtype_named(name)
        self._of_parts: WeakKeyDictionary[Rows, dict[tuple[int, ...], dict[str, Tensor]]] = WeakKeyDictionary()

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, each with one line where the selection keeps one; otherwise as they are.

        Raises CaptureError for a number that store_dtype cannot hold.
        """
        if self._reduction is None:
            return list(samples)
        return [replace(sample, parts=[Part(self._line(self._reduction, sample), [0])]) for sample in samples]

    def before(self, sink: Callable[[list[Sample]], None]) -> Callable[[list[Sample]], None]:
        """A sink that takes samples as they come, and hands them on as the selection keeps them."""
        return lambda samples: sink(self(samples))

    def _line(self, reduction: SampleReduction, sample: Sample) -> Line:
        """The line of a sample. It is NaN for a sample of which no position is kept."""
        parts = [part for part in sample.parts if len(part.where)]
        n_rows = sum(len(part.where) for part in parts)
        of_parts = [self._of_part(reduction, part) for part in parts]
        numbers: dict[str, Tensor] = {}
        for key, rows in sample.parts[0].rows.activations.items():
            if of_parts:
                line = reduction.of_parts(torch.stack([each[key] for each in of_parts]), n_rows)
            else:
                line = torch.full((rows.shape[1],), torch.nan)
            numbers[key] = narrowed(key, line, self._dtype)[None]  # [1, width]
        return Line.of(numbers)

    def _of_part(self, reduction: SampleReduction, part: Part) -> dict[str, Tensor]:
        """Key -> [width], float32."""
        known, where = self._of_parts.setdefault(part.rows, {}), tuple(part.where)
        if where not in known:
            index = torch.tensor(where, dtype=torch.long)
            known[where] = {key: reduction.of_part(rows[index].float()) for key, rows in part.rows.activations.items()}
        return known[where]

"""The last place of kept rows on the CPU: one array a key for each forward, or one for many forwards that feed one column each.

Rows land here from a ring (`ring.py`), or are put here directly by a model on the CPU. Nothing is copied again afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.transfer.ring import Land
from AutomaticEval.samples import RowFormat

Places = np.ndarray[Any, np.dtype[np.int64]]


class OneForward:
    """The kept rows of one forward: key -> [n_kept, width], in the order of its (batch row, column) pairs."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        """rows, columns: [n_kept], int64, on the CPU."""
        self.pairs = rows, columns
        self.arrays: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pairs[0])

    @property
    def n_room(self) -> int:
        """Rows that there is room for."""
        return len(self)

    def landing(self, formats: Mapping[str, RowFormat]) -> Land:
        """Makes room for some keys, and says how their rows land: those of the first key, [n_kept, width], then those of the next."""
        for key, form in formats.items():
            self.arrays[key] = _room(len(self), form.width, dtype=form.dtype)
        arrays = [self.arrays[key] for key in formats]

        def land(sent: Tensor, first: int) -> None:
            begin = 0
            for array in arrays:
                place = array.view(-1).view(torch.uint8)
                start, stop = max(begin, first), min(begin + len(place), first + len(sent))
                if start < stop:
                    _copy(sent[start - first : stop - first], place[start - begin : stop - begin])
                begin += len(place)

        return land

    def places(self, row: int, columns: Places) -> Places:
        """Where the pairs (row, column) are: [n]; -1 for one that is not here."""
        codes, order = self._sorted
        if not len(codes):
            return np.full(len(columns), -1)
        wanted = (row << 40) + columns
        near = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        places: Places = np.where(codes[near] == wanted, order[near], -1)
        return places

    @cached_property
    def _sorted(self) -> tuple[Places, Places]:
        """The pairs as ascending numbers, and where each of them is."""
        codes = (self.pairs[0].numpy() << 40) + self.pairs[1].numpy()
        order = np.argsort(codes, kind="stable")
        return codes[order], order

    def at(self, row: int, places: Places) -> dict[str, Tensor]:
        """Key -> [n, width]."""
        return {key: _picked(array, places) for key, array in self.arrays.items()}

    def all_rows(self, key: str) -> Tensor:
        """[n_kept, width]"""
        return self.arrays[key]


class Steps:
    """The rows of forwards that follow each other and each keep one column of every batch row: key -> [n_rows, most, width].

    So the rows of one batch row stand one after the other, whatever number of forwards computed them.
    """

    def __init__(self, n_rows: int, first: int, most: int) -> None:
        """first: the column of the first forward. most: of how many forwards the rows have room here."""
        self.n_rows, self.first, self.most = n_rows, first, most
        self.n = 0
        """Forwards so far."""
        self.arrays: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self.n_rows * self.n

    @property
    def n_room(self) -> int:
        """Rows that there is room for."""
        return self.n_rows * self.most

    def room(self, key: str, form: RowFormat) -> Tensor:
        """The array of a key, which is filled step by step. It is made when it is first asked for."""
        if key not in self.arrays:
            self.arrays[key] = _room(self.n_rows, self.most, form.width, dtype=form.dtype)
        return self.arrays[key]

    def landing(self, formats: Mapping[str, RowFormat], step: int, n_steps: int) -> Land:
        """How the rows of some keys, all of one dtype, land: of each step, from number `step` on, [n_rows, width] of every key.

        They must be sent in one chunk; `landing_of_rows` is for larger ones.
        """
        rooms = [(self.room(key, form), self.n_rows * form.width) for key, form in formats.items()]
        dtype = next(iter(formats.values())).dtype

        def land(sent: Tensor, first: int) -> None:
            by_step = sent.view(dtype).view(n_steps, -1)
            begin = 0
            for room, size in rooms:
                rows = by_step[:, begin : begin + size].view(n_steps, self.n_rows, -1)  # [n_steps, n_rows, width]
                _copy(rows.transpose(0, 1), room[:, step : step + n_steps])
                begin += size

        return land

    def landing_of_rows(self, key: str, form: RowFormat, step: int) -> Land:
        """How the rows of one key in one step land, [n_rows, width]. Each chunk must hold whole rows."""
        room, row_bytes = self.room(key, form), form.width * form.dtype.itemsize

        def land(sent: Tensor, first: int) -> None:
            rows = sent.view(form.dtype).view(-1, form.width)
            _copy(rows, room[first // row_bytes :, step][: len(rows)])

        return land

    def places(self, row: int, columns: Places) -> Places:
        """As in `OneForward`."""
        is_here = (columns >= self.first) & (columns < self.first + self.n)
        places: Places = np.where(is_here, columns - self.first, -1)
        return places

    def at(self, row: int, places: Places) -> dict[str, Tensor]:
        """Key -> [n, width]."""
        return {key: _picked(array[row], places) for key, array in self.arrays.items()}

    def all_rows(self, key: str) -> Tensor:
        """[n * n_rows, width], forward after forward."""
        return self.arrays[key][:, : self.n].transpose(0, 1).flatten(0, 1)


HostRows = OneForward | Steps


def _room(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory to be filled. Also within torch's inference mode, because threads outside of it fill it."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype)


_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _copy(source: Tensor, place: Tensor) -> None:
    """Copy in this thread alone, bit for bit: torch would use all of its threads for each of ours."""
    whole = _WHOLE_NUMBERS[source.element_size()]
    np.copyto(place.view(whole).numpy(), source.view(whole).numpy())


def _picked(array: Tensor, places: Places) -> Tensor:
    """Some rows of an array [n, width], without a copy when they follow each other."""
    first = int(places[0]) if len(places) else 0
    if np.array_equal(places, np.arange(first, first + len(places))):
        return array[first : first + len(places)]
    return array[torch.from_numpy(places)]


def runs_of(holders: Sequence[HostRows], row: int, columns: Sequence[int]) -> list[Mapping[str, Tensor]]:
    """The rows of some columns of one batch row, as parts that follow each other: key -> [n_columns, width] each.

    Raises CaptureError for a column that no holder has.
    """
    wanted = np.asarray(columns, np.int64)
    owners, places = np.full(len(wanted), -1), np.full(len(wanted), -1)
    for number, holder in enumerate(holders):
        here = holder.places(row, wanted)
        owners[here >= 0], places[here >= 0] = number, here[here >= 0]
    if (owners < 0).any():
        absent = int(wanted[owners < 0][0])
        raise CaptureError(f"batch row {row}: column {absent} was asked for but never computed.")
    bounds = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(wanted)]
    return [
        holders[owners[start]].at(row, places[start:stop]) for start, stop in itertools.pairwise(bounds) if stop > start
    ]

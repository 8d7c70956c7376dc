"""Rows of one site as an array-like on the disk, and as a torch Dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from AutomaticEval.errors import StoreError
from AutomaticEval.store.bits import bits_type, from_bits
from AutomaticEval.store.ragged import Array, ranges_of
from AutomaticEval.store.reading.row_origins import RowOrigins
from AutomaticEval.store.reading.sharded_rows import ShardedRows


class RowArray:
    """Rows of one site as an array-like [n_rows, width]: `rows[3]`, `rows[10:20]`, `rows[[5, 2]]`, `len(rows)`.

    The rows that are asked for are read from the disk, as a torch tensor in their own dtype (float32 for int8).
    """

    def __init__(
        self, store: ShardedRows, key: str, numbers: Array, token_ids: Any, positions: Any, where_from: RowOrigins
    ) -> None:
        self._store, self._key, self._numbers = store, key, numbers
        self._token_ids, self._positions = token_ids, positions
        self.where_from = where_from
        """`rows.where_from[i]` is (samples, position): which samples of the run have row i, and its place in their sequence."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._numbers), self._store.formats[self._key].width

    @property
    def dtype(self) -> torch.dtype:
        return self._store.formats[self._key].read_as

    @property
    def token_ids(self) -> Array:
        """[n_rows]: the token that was fed at each row."""
        token_ids: Array = self._token_ids[self._numbers]
        return token_ids

    @property
    def positions(self) -> Array:
        """[n_rows]: the position of each row in its sequence."""
        positions: Array = self._positions[self._numbers]
        return positions

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: int | slice | Sequence[int] | Array | Tensor) -> Tensor:
        if not isinstance(at, slice):
            at = np.asarray(at)
            if at.ndim == 0:
                number = int(self._numbers[int(at)])
                return self._store.read(self._key, [(number, number + 1)])[0]
            if at.ndim > 1:
                raise IndexError(f"rows are numbered by one list; found indices of shape {at.shape}.")
            at = at if at.size else np.arange(0)
        numbers = self._numbers[at]
        if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and np.all(np.diff(numbers) == 1):
            return self._store.read(self._key, [(int(numbers[0]), int(numbers[-1]) + 1)])
        return self._store.take(self._key, numbers)

    def buffer(self, n_rows: int) -> Tensor:
        """An empty tensor [n_rows, width] to read into. It is numpy's, which asks for large pages: random rows of it are found faster."""
        return from_bits(np.empty((n_rows, self.shape[1]), bits_type(self.dtype)), self.dtype)

    def read_into(self, at: Array, out: Tensor) -> None:
        """Read some rows, by their numbers in ascending order, into a tensor [n, width] of this dtype, which saves memory and its making."""
        self._store.read(self._key, ranges_of(self._numbers[at]), out)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All rows as numpy; bfloat16, which numpy lacks, becomes float32."""
        whole = self[:]
        array: Array = (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy()
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return f"<Rows of {self._key}: {self.shape[0]} x {self.shape[1]}, {str(self.dtype).removeprefix('torch.')}>"


class RowsDataset(Dataset[Any]):
    """Rows as a torch Dataset, with or without labels. It holds no open file, so that the workers of a DataLoader may share it."""

    def __init__(self, rows: RowArray, labels: Sequence[Any] | None) -> None:
        self.rows, self.labels = rows, labels

    @classmethod
    def labelled(cls, rows: RowArray, labels: Sequence[Any] | None, label: str | None, owner: str) -> RowsDataset:
        """label: the labels' name, owner: what has them, for the message. Raises StoreError when a label is missing."""
        if labels is not None and None in labels:
            raise StoreError(f"{owner} {labels.index(None)} has no {label!r}; leave it out with where.")
        return cls(rows, labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        return row if self.labels is None else (row, self.labels[index])

    def __repr__(self) -> str:
        return f"<Dataset of {self.rows!r}{'' if self.labels is None else ', each with a label'}>"

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A whole batch, for which a DataLoader asks: the files are read once, in their own order."""
        rows = self.rows[indices]
        return (
            list(rows) if self.labels is None else [(row, self.labels[i]) for row, i in zip(rows, indices, strict=True)]
        )

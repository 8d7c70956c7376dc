"""Rows of a run in random order, for training: blocks of neighbouring rows in random order, and the rows of many blocks mixed in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from AutomaticEval.errors import StoreError
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.row_array import RowArray

BUFFER_ROWS = 65536
BLOCKS = 64
"""So many blocks are in the buffer together: the rows of one batch come from so many parts of the corpus."""


class BlockOrder:
    """In which order the rows of one pass are read, and in which they are given.

    The rows are cut into blocks of buffer_rows / BLOCKS neighbours. The blocks are put in random order, and BLOCKS of them at a time are a
    group. Within a group, every order of its rows is equally likely. A row of one group never comes among those of another.
    seeds: what decides both; None leaves the rows in their own order. share: which of the blocks are meant, for one worker of several.
    Raises StoreError for a buffer of less than one row.
    """

    def __init__(
        self, n_rows: int, buffer_rows: int, seeds: Sequence[int] | None, share: slice = slice(None, None)
    ) -> None:
        if buffer_rows < 1:
            raise StoreError(f"buffer_rows is {buffer_rows}; it must be 1 or more.")
        self._n_rows, self._n_block, self._seeds = n_rows, max(1, buffer_rows // BLOCKS), seeds
        n_blocks = -(-n_rows // self._n_block)
        order = np.arange(n_blocks) if seeds is None else np.random.default_rng(seeds).permutation(n_blocks)
        self._blocks = order[share]
        self._together = min(BLOCKS, buffer_rows)

    def __len__(self) -> int:
        """The number of groups."""
        return -(-len(self._blocks) // self._together)

    @property
    def most(self) -> int:
        """The rows of the largest group, at most."""
        return min(self._n_rows, self._together * self._n_block)

    def numbers(self, group: int) -> Array:
        """The numbers of a group's rows, ascending, as they are read."""
        blocks = np.sort(self._of(group))
        numbers = (blocks[:, None] * self._n_block + np.arange(self._n_block)).reshape(-1)
        return numbers[numbers < self._n_rows]

    def size(self, group: int) -> int:
        """How many rows a group has."""
        starts = self._of(group) * self._n_block
        return int((np.minimum(starts + self._n_block, self._n_rows) - starts).sum())

    def mixed(self, group: int) -> Tensor:
        """In which order the rows that `numbers` names are given: indices into them."""
        n_rows = self.size(group)
        if self._seeds is None:
            return torch.arange(n_rows)
        return torch.from_numpy(np.random.default_rng([*self._seeds, 1 + group]).permutation(n_rows))

    def _of(self, group: int) -> Array:
        blocks: Array = self._blocks[group * self._together : (group + 1) * self._together]
        return blocks


class ShuffledRows(IterableDataset[Tensor]):
    """Every row once, [width] each, in an order that is drawn anew for each pass, as `BlockOrder` says.

    About two times buffer_rows rows are in memory. `Run.batches` reads whole batches, without workers, faster. The order is decided by seed and by the number of passes begun before. With the workers
    of a DataLoader, each worker gives other rows, and the order is also decided by torch's own seed.
    Raises StoreError for a buffer of less than one row.
    """

    def __init__(self, rows: RowArray, seed: int = 0, buffer_rows: int = BUFFER_ROWS) -> None:
        BlockOrder(len(rows), buffer_rows, None)
        self.rows, self.seed, self.buffer_rows = rows, seed, buffer_rows
        self.n_passes = 0
        """Number of passes begun so far."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        for some in self._mixed():
            yield from some

    def _mixed(self) -> Iterator[Tensor]:
        """The rows, a group at a time [n, width]."""
        worker = get_worker_info()
        number, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        of_workers = 0 if worker is None else worker.seed - worker.id  # the same in all workers of a pass
        seeds = [(self.seed + of_workers) % 2**63, self.n_passes]
        self.n_passes += 1
        order = BlockOrder(len(self.rows), self.buffer_rows, seeds, slice(number, None, n_workers))
        for group in range(len(order)):
            yield self.rows[order.numbers(group)].index_select(0, order.mixed(group))

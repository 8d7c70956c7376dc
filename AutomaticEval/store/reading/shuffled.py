"""Rows of a run in random order, for training: blocks of neighbours are read in random order, rows drawn from many blocks together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from AutomaticEval.errors import StoreError
from AutomaticEval.store.row_array import RowArray

BUFFER_ROWS = 65536
BLOCKS = 64
"""Blocks that are in the buffer together: rows in one batch come from so many places of the corpus."""


class ShuffledRows(IterableDataset[Tensor]):
    """Every row once, [width] each, in an order that is drawn anew each time.

    About three times buffer_rows are in memory. The order follows from seed and the number of passes begun before; over one pass the workers of
    a DataLoader have different rows, and the order follows from torch's own seed, too.
    """

    def __init__(self, rows: RowArray, seed: int = 0, buffer_rows: int = BUFFER_ROWS) -> None:
        if buffer_rows < 1:
            raise StoreError(f"buffer_rows is {buffer_rows}; it must be 1 or more.")
        self.rows, self.seed, self.buffer_rows = rows, seed, buffer_rows
        self.n_passes = 0
        """Begun so far."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        for some in self._mixed():
            yield from some

    def batches(self, n_rows: int) -> Iterator[Tensor]:
        """[n_rows, width] each; the last one may be smaller. Raises StoreError for less than one row."""
        if n_rows < 1:
            raise StoreError(f"batches of {n_rows} rows were asked for; at least 1 is needed.")
        left: list[Tensor] = []
        n_left = 0
        for some in self._mixed():
            left.append(some)
            n_left += len(some)
            if n_left >= n_rows:
                whole = torch.cat(left)
                yield from (whole[start : start + n_rows] for start in range(0, n_left - n_rows + 1, n_rows))
                left = [whole[n_left - n_left % n_rows :].clone()]
                n_left %= n_rows
        if n_left:
            yield torch.cat(left)

    def _mixed(self) -> Iterator[Tensor]:
        """The rows in slabs [n, width], each drawn from a full buffer."""
        worker = get_worker_info()
        number, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        of_workers = 0 if worker is None else worker.seed - worker.id  # the same in all workers of a pass
        draw = torch.Generator().manual_seed((self.seed + of_workers + self.n_passes) % 2**63)
        self.n_passes += 1
        n_block = max(1, self.buffer_rows // BLOCKS)
        order = torch.randperm(-(-len(self.rows) // n_block), generator=draw)[number::n_workers].tolist()
        held: list[Tensor] = []
        n_held = 0
        for block in order:
            held.append(self.rows[block * n_block : (block + 1) * n_block])
            n_held += len(held[-1])
            if n_held + n_block > self.buffer_rows:  # half goes out, half stays and mixes with what comes
                whole = torch.cat(held)[torch.randperm(n_held, generator=draw)]
                n_out = max(1, n_held // 2)
                yield whole[:n_out]
                held, n_held = [whole[n_out:].clone()], n_held - n_out
        if n_held:
            yield torch.cat(held)[torch.randperm(n_held, generator=draw)]

"""Rows of a run in batches, for training: of one site, or of several sites at the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.errors import StoreError
from AutomaticEval.store.reading.shuffled import BUFFER_ROWS, BlockOrder
from AutomaticEval.store.row_array import RowArray


@dataclass
class RowBatches:
    """All rows of a run in batches: `for batch in batches` goes through one epoch, or through the rest of the one that was begun.

    A batch is [batch_size, width]; of several sites a dict, site -> [batch_size, width], in which row i of each is the same token. The last
    batch of an epoch may be smaller. Each row is there once in an epoch. `len(batches)` is the number of batches of an epoch.
    """

    sites: Mapping[str, RowArray]
    batch_size: int
    is_one: bool
    """Whether a batch is a tensor, and not a dict."""
    shuffle: bool = True
    seed: int = 0
    step: int = 0
    """How many batches were given so far, over all epochs: what `start` takes to go on from here."""
    device: str | torch.device | None = None
    """Where batches are put; None leaves them on the CPU."""
    buffer_rows: int = BUFFER_ROWS
    """So many rows of each site are in memory at once, beside the batch."""

    def __post_init__(self) -> None:
        """Raises StoreError for a batch or a buffer of less than one row, a step below 0, and an unknown device."""
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise StoreError(
                f"batches of {self.batch_size!r} rows were asked for; it must be a whole number, at least 1."
            )
        if self.step < 0:
            raise StoreError(f"start is {self.step}; it is the number of batches that were given before, 0 or more.")
        BlockOrder(0, self.buffer_rows, None)
        if self.device is not None:
            try:
                self.device = torch.device(self.device)
            except RuntimeError:
                raise StoreError(f"no device {self.device!r}; write cpu, cuda, or cuda:0.") from None

    @property
    def n_rows(self) -> int:
        """The rows of an epoch."""
        return len(next(iter(self.sites.values())))

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return self.step // max(1, len(self))

    def __len__(self) -> int:
        return -(-self.n_rows // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        epoch, step = divmod(self.step, max(1, len(self)))
        order = BlockOrder(self.n_rows, self.buffer_rows, [self.seed % 2**63, epoch] if self.shuffle else None)
        held: list[dict[str, Tensor]] = []
        n_held = 0
        for some in self._parts(order, step * self.batch_size):
            held.append(some)
            n_held += len(next(iter(some.values())))
            if n_held == self.batch_size:
                self.step += 1
                yield self._batch(held)
                held, n_held = [], 0
        if held:
            self.step += 1
            yield self._batch(held)

    def _parts(self, order: BlockOrder, n_before: int) -> Iterator[dict[str, Tensor]]:
        """The rows after the first n_before, a batch or a part of one at a time: where one group ends in a batch, the next goes on."""
        room = self.batch_size
        buffers = {site: rows.buffer(order.most) for site, rows in self.sites.items()}
        for group in range(len(order)):
            size = order.size(group)
            if n_before >= size:
                n_before -= size
                continue
            numbers, mixed = order.numbers(group), order.mixed(group)
            read = {site: buffer[:size] for site, buffer in buffers.items()}
            for site, rows in self.sites.items():
                rows.read_into(numbers, read[site])
            at, n_before = n_before, 0
            while at < size:
                some = mixed[at : at + room]
                # far faster than read[some], which goes number by number
                yield {site: rows.index_select(0, some) for site, rows in read.items()}
                at += len(some)
                room = room - len(some) or self.batch_size

    def _batch(self, parts: list[dict[str, Tensor]]) -> Any:
        whole = parts[0] if len(parts) == 1 else {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
        if isinstance(self.device, torch.device):
            is_cuda = self.device.type == "cuda"  # from pinned memory, the copy runs beside what the GPU computes
            whole = {
                site: (rows.pin_memory() if is_cuda else rows).to(self.device, non_blocking=is_cuda)
                for site, rows in whole.items()
            }
        return next(iter(whole.values())) if self.is_one else whole

"""Copies kept rows from a GPU to the CPU while the model runs on: one transfer for each forward, through two pinned buffers.

The copies run on a stream of their own. Nothing waits for a copy until its buffer is needed again. Does not know what the rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arrived = Callable[[str, Tensor], None]
"""Takes a key and its rows, which are on the CPU. It is called in the order in which the rows were sent."""


def wait_until_sent() -> None:
    """Everything that was on its way to the CPU has arrived."""


@dataclass
class _Buffer:
    """One pinned buffer, and the rows that are on their way into it."""

    host: Tensor | None = None
    event: Any = None
    parts: list[tuple[str, torch.Size, torch.dtype]] = field(default_factory=list)


class Staging:
    """Sends rows from one device to the CPU. All of them have arrived after `finish`."""

    def __init__(self, device: torch.device, arrived: Arrived) -> None:
        self._device, self._arrived = device, arrived
        self._buffers = (_Buffer(), _Buffer())
        self._n_sent = 0
        self._stream = self._make_stream()

    def send(self, cuts: dict[str, Tensor]) -> None:
        """Start the transfer of the rows of one forward: key -> [n_kept, width]. The current stream computes them."""
        buffer = self._buffers[self._n_sent % 2]
        self._n_sent += 1
        self._unpack(buffer)
        ordered = sorted(
            cuts.items(), key=lambda item: -item[1].element_size()
        )  # the widest dtype first, so that every part is aligned
        flat = torch.cat([rows.contiguous().view(-1).view(torch.uint8) for _, rows in ordered])
        if buffer.host is None or len(buffer.host) < len(flat):
            buffer.host = self._make_host(len(flat))
        buffer.parts = [(key, rows.shape, rows.dtype) for key, rows in ordered]
        buffer.event = self._copy(flat, buffer.host[: len(flat)])

    def finish(self) -> None:
        """Wait for all rows that are on their way."""
        for number in (self._n_sent, self._n_sent + 1):  # the older buffer first
            self._unpack(self._buffers[number % 2])

    def _unpack(self, buffer: _Buffer) -> None:
        if not buffer.parts:
            return
        self._wait(buffer.event)
        assert buffer.host is not None
        at = 0
        for key, shape, dtype in buffer.parts:
            size = shape.numel() * dtype.itemsize
            self._arrived(
                key, buffer.host[at : at + size].view(dtype).view(shape).clone()
            )  # a copy, because the buffer is used again
            at += size
        buffer.parts = []

    def _make_stream(self) -> Any:
        stream: Any = torch.cuda.Stream
        return stream(self._device)

    def _make_host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _copy(self, flat: Tensor, host: Tensor) -> Any:
        """Copy on the stream for copies, after what the current stream computes now. Returns the event of its end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(flat, non_blocking=True)
        flat.record_stream(self._stream)  # torch does not use its memory again before the copy is over
        return self._stream.record_event()

    def _wait(self, event: Any) -> None:
        event.synchronize()

"""The graph of a device: operations that were recorded once, and run again without any Python. CUDA has such graphs.

This is the one place that knows which devices have graphs. Knows nothing of models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

CUDA: Any = torch.cuda
"""torch.cuda, whose annotations are incomplete."""


class DeviceGraph(Protocol):
    """Operations of a device that are recorded once, and then replayed on the same tensors."""

    def warming(self) -> AbstractContextManager[None]:
        """The forwards inside come before the recording; they let libraries make what they make at their first call."""

    def rehearsing(self) -> AbstractContextManager[None]:
        """The last forward before the recording: raises RuntimeError for what cannot be recorded, as far as the device can tell."""

    def recording(self) -> AbstractContextManager[Any]:
        """The operations inside are recorded. What they compute is there after the first replay."""

    def replay(self) -> None:
        """Run the operations again."""


class CudaGraph:
    """A CUDA graph. It has memory of its own, which is free again when the graph is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = CUDA.CUDAGraph()

    @contextmanager
    def warming(self) -> Iterator[None]:
        """On a stream of its own, as torch asks for before a recording."""
        with CUDA.device(self._device):
            current, side = CUDA.current_stream(), _stream_of(self._device)
            side.wait_stream(current)
            try:
                with CUDA.stream(side):
                    yield
            finally:
                current.wait_stream(side)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Also raises for what waits for the GPU, before a recording has begun: one that fails may leave torch's memory in a bad state."""
        before = CUDA.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it does not find everything
            CUDA.set_sync_debug_mode("error")
        try:
            with self.warming():
                yield
        finally:
            CUDA.set_sync_debug_mode(before)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Other threads may go on calling CUDA meanwhile; this one may neither wait for the GPU nor read a number back."""
        with (
            CUDA.device(self._device),
            CUDA.stream(CUDA.current_stream(self._device)),  # comes back also when the end of a recording fails
            CUDA.graph(self._graph, stream=_stream_of(self._device), capture_error_mode="thread_local"),
        ):
            yield

    def replay(self) -> None:
        self._graph.replay()


_streams: dict[torch.device, Any] = {}


def _stream_of(device: torch.device) -> Any:
    """The stream on which steps are recorded. One is enough: each stream has a workspace of its own, and torch gives out the same few again."""
    if device not in _streams:
        _streams[device] = CUDA.Stream(device)
    return _streams[device]


def reserved_bytes(device: torch.device) -> int:
    """The memory of a device that torch has taken; 0 where that is not known."""
    return int(CUDA.memory_reserved(device)) if device.type == "cuda" else 0


def graphs_of(device: torch.device) -> Callable[[], DeviceGraph] | None:
    """What makes a new graph of a device; None for a device that has no graphs."""
    return (lambda: CudaGraph(device)) if device.type == "cuda" else None

"""The graph of a device: operations that were recorded once, and run again without any Python. CUDA has such graphs.

This is the one place that knows which devices have graphs. Knows nothing of models.
"""

from __future__ import annotations

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
            current, side = CUDA.current_stream(), CUDA.Stream()
            side.wait_stream(current)
            with CUDA.stream(side):
                yield
            current.wait_stream(side)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Other threads may go on calling CUDA meanwhile; this one may neither wait for the GPU nor read a number back."""
        with (
            CUDA.device(self._device),
            CUDA.graph(self._graph, stream=CUDA.Stream(), capture_error_mode="thread_local"),
        ):
            yield

    def replay(self) -> None:
        self._graph.replay()


def graphs_of(device: torch.device) -> Callable[[], DeviceGraph] | None:
    """What makes a new graph of a device; None for a device that has no graphs."""
    return (lambda: CudaGraph(device)) if device.type == "cuda" else None

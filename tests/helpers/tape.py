"""A stand-in for CUDA's graphs on a CPU: a tape of operations, run again on the same tensors without any Python of a model or a hook.

What a graph would freeze is frozen here, too. What a GPU refuses while it records is refused: a number that is read back, a tensor that is made
of Python's numbers, a shape that depends on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from AutomaticEval.capture.graph import device_graph

ATEN = torch.ops.aten
REFUSED = {
    ATEN._local_scalar_dense.default: "a number was read back",
    ATEN.equal.default: "two tensors were compared on the host",
    ATEN.lift_fresh.default: "a tensor was made of numbers of the host",
    ATEN.nonzero.default: "a shape depends on values",
    ATEN.masked_select.default: "a shape depends on values",
    ATEN._unique2.default: "a shape depends on values",
}


class Tape(TorchDispatchMode):
    """One recorded step. n_recorded counts all recordings."""

    n_recorded = 0
    n_replayed = 0

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in REFUSED:
            raise RuntimeError(f"{REFUSED[operation]} while a step was recorded")
        out = operation(*args, **(kwargs or {}))
        self._done.append((operation, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        Tape.n_replayed += 1
        for operation, args, kwargs, before in self._done:
            for old, new in zip(tree_leaves(before), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @contextmanager
    def warming(self) -> Iterator[None]:
        yield

    rehearsing = warming

    @contextmanager
    def recording(self) -> Iterator[None]:
        Tape.n_recorded += 1
        with self:
            yield


def use_tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every device graphs that are tapes."""
    monkeypatch.setattr(device_graph, "graphs_of", lambda device: Tape)
    monkeypatch.setattr(Tape, "n_recorded", 0)
    monkeypatch.setattr(Tape, "n_replayed", 0)

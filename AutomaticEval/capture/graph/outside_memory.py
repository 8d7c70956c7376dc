"""`OutsideMemory`: which tensors a recording reads that were there before it. A graph reads their memory at every replay, so they must live on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OutsideMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the with, every tensor that an operation reads or writes, and that no operation inside made, is kept in `tensors`.

    They are found by the operations themselves: weights, inputs, values of edits, matrices, whatever a hook or a layer has put somewhere.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_address: dict[int, Tensor] = {}
        self._made: set[int] = set()
        """The addresses of memory that operations inside have taken."""

    @property
    def tensors(self) -> list[Tensor]:
        """One tensor of each memory from outside."""
        return list(self._by_address.values())

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            address = _address(tensor)
            if address not in self._made:
                self._by_address.setdefault(address, tensor)
        out = operation(*args, **(kwargs or {}))
        self._made.update(_address(each) for each in _tensors(out) if _address(each) not in self._by_address)
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())

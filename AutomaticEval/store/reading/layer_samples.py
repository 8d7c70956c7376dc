"""One site of every sample of a run, as a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor


class LayerSamples(Sequence[Tensor]):
    """One site of every sample of a run, [n_positions, width] each. Each is read when it is asked for."""

    def __init__(self, n_samples: int, read: Callable[[int], Tensor]) -> None:
        self._n_samples, self._read = n_samples, read

    def __len__(self) -> int:
        return self._n_samples

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._read(index)

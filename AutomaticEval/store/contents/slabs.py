"""Changes how many rows the slabs of an array have. The rows and their order stay the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.store.ragged import Array

_SLAB_BYTES = 2**19
"""Small enough for the processor's cache, large enough that one call of Python's for each costs nothing."""
_LARGE_NUMBERS = 2**15
"""torch copies a tensor of so many numbers with all of its threads, which would cost more than they give; smaller ones, with one."""


def resized(slabs: Iterable[Array], n_rows: int) -> Iterator[Array]:
    """The rows in slabs of n_rows; the last slab may be shorter. Large slabs are cut without a copy."""
    waiting: list[Array] = []
    n_waiting = 0
    for slab in slabs:
        at = 0
        while n_waiting + len(slab) - at >= n_rows:
            stop = at + n_rows - n_waiting
            last = slab[at:stop]
            yield np.concatenate([*waiting, last]) if waiting else last
            waiting, n_waiting, at = [], 0, stop
        if at < len(slab):
            waiting.append(slab[at:])
            n_waiting += len(slab) - at
    if waiting:
        yield np.concatenate(waiting)


def gathered(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows of tensors [n, width]: small tensors together, in slabs of about _SLAB_BYTES, and large ones as they are, without a copy."""
    waiting: list[Tensor] = []
    n_bytes = 0
    for tensor in tensors:
        is_large = tensor.numel() >= _LARGE_NUMBERS
        if waiting and (is_large or n_bytes + tensor.nbytes > _SLAB_BYTES):
            yield torch.cat(waiting)
            waiting, n_bytes = [], 0
        if is_large:
            yield tensor
        else:
            waiting.append(tensor)
            n_bytes += tensor.nbytes
    if waiting:
        yield torch.cat(waiting)

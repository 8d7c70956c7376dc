"""Changes how many rows the slabs of an array have. The rows and their order stay the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from AutomaticEval.store.ragged import Array

_SLAB_BYTES = 2**20
"""Small enough for the processor's cache, large enough that the pages on the disk are read back at full speed."""


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


def enlarged(slabs: Iterable[Array]) -> Iterator[Array]:
    """The rows in slabs of at least _SLAB_BYTES, for arrays that come in thousands of small slabs; the last slab may be smaller."""
    waiting: list[Array] = []
    n_bytes = 0
    for slab in slabs:
        waiting.append(slab)
        n_bytes += slab.nbytes
        if n_bytes >= _SLAB_BYTES:
            yield np.concatenate(waiting) if len(waiting) > 1 else slab
            waiting, n_bytes = [], 0
    if waiting:
        yield np.concatenate(waiting)

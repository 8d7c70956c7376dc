"""Writes the rows of sites to their places in a file, from several threads, and computes their checksums on the way.

A thread writes all rows of a site, in order, because the checksum of a whole dataset cannot be put together from parts. HDF5 is not
asked: it has set the places aside. Knows nothing of datasets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from AutomaticEval.store.bits import raw_bytes
from AutomaticEval.store.contents.file_contents import Activation
from AutomaticEval.store.disk.in_threads import in_threads, n_threads_for
from AutomaticEval.store.finite import n_non_finite
from AutomaticEval.store.hdf5.checksums import ArrayHash
from AutomaticEval.store.ragged import Array

THREAD_BYTES = 2**20
"""The rows that one thread writes before another is worth its start."""
_STEP_BYTES = 2**19
"""So many bytes are written at once: they stay in the processor's cache until they are hashed and looked at."""


class Place(NamedTuple):
    """Where the rows of a site belong in a file."""

    key: str
    activation: Activation
    offset: int
    n_rows: int
    row_bytes: int
    block_rows: int
    """Rows of a block, each of which has a checksum."""

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes


class Written(NamedTuple):
    """What was found out of a site while it was written."""

    hashed: ArrayHash
    n_non_finite: int


def write_rows(path: Path, places: Sequence[Place]) -> list[Written]:
    """Write the rows of each place, and say what was found of each. Raises OSError, and what reading the rows raises."""
    largest_first = sorted(range(len(places)), key=lambda number: -places[number].n_bytes)
    n_threads = n_threads_for(sum(place.n_bytes for place in places), THREAD_BYTES)
    written = in_threads(partial(_write, path), [places[number] for number in largest_first], n_threads)
    found = dict(zip(largest_first, written, strict=True))
    return [found[number] for number in range(len(places))]


def _write(path: Path, place: Place) -> Written:
    hashed, n_wrong = ArrayHash(place.block_rows * place.row_bytes), 0
    at = place.offset
    end = place.offset + place.n_bytes
    handle = os.open(path, os.O_WRONLY)  # its own: it stays this file's, whatever becomes of the other threads
    try:
        for slab in _steps(place):
            assert at + slab.nbytes <= end, f"{place.key}: more rows came than the {place.n_rows} that were expected"
            hashed.add(slab)
            n_wrong += n_non_finite(slab, place.activation.dtype)
            _write_all(handle, raw_bytes(slab), at)
            at += slab.nbytes
    finally:
        os.close(handle)
    assert at == end, f"{place.key}: {at - place.offset} bytes of rows came, expected {place.n_bytes}"
    return Written(hashed, n_wrong)


def _steps(place: Place) -> Iterator[Array]:
    """The rows in contiguous slabs of about _STEP_BYTES or less."""
    n_rows = max(1, _STEP_BYTES // max(1, place.row_bytes))
    for slab in place.activation.slabs():
        values = np.ascontiguousarray(slab)
        if values.nbytes <= 2 * _STEP_BYTES:
            yield values
            continue
        for at in range(0, len(values), n_rows):
            yield values[at : at + n_rows]


def _write_all(handle: int, view: memoryview, at: int) -> None:
    """The system may write only a part of what it is given, as when the disk fills up. Raises OSError."""
    written = 0
    while written < len(view):
        written += os.pwrite(handle, view[written:], at + written)

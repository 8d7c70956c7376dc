"""Datasets of numbers that are written with their checksums."""

from __future__ import annotations

import math
from typing import Any

import h5py
import numpy as np

from AutomaticEval.errors import CaptureError
from AutomaticEval.store.hdf5 import checksums
from AutomaticEval.store.hdf5.trailer import CHECKSUMS

_SLAB_NUMBERS = 2**18
"""So many numbers are written at once. Picking them from shards takes about a hundred bytes of memory for each."""


def write_numbers(file: h5py.File, name: str, values: Any, dtype: str) -> None:
    """Write an array of one or more dimensions, or an object that is sliced like one, as a dataset of a dtype.

    Raises CaptureError for whole numbers that the dtype cannot hold.
    """
    shape = values[:0].shape[1:]
    dataset = file.create_dataset(name, (len(values), *shape), dtype, track_times=False)
    row_bytes = dataset.dtype.itemsize * math.prod(shape)
    rows = checksums.rows_per_block(row_bytes)
    hashed = checksums.ArrayHash(rows * row_bytes)
    step = max(1, _SLAB_NUMBERS // max(1, math.prod(shape)))
    for at in range(0, len(values), step):
        given = np.asarray(values[at : at + step])
        slab = np.ascontiguousarray(given, dtype=dtype)
        if given.dtype.kind in "iu" and not np.array_equal(given, slab):
            raise CaptureError(f"/{name} holds numbers that {dtype} cannot hold: {given.min()} to {given.max()}.")
        dataset[at : at + step] = slab
        hashed.add(slab)
    write_checksums(dataset, hashed, rows)


def write_checksums(dataset: h5py.Dataset, hashed: checksums.ArrayHash, rows: int) -> None:
    """Write the checksum of a dataset and, where it has several blocks, those of its blocks. rows: in a block."""
    dataset.attrs[checksums.NAME] = hashed.hexdigest()
    blocks = hashed.blocks()
    if len(blocks) > 1:
        of_blocks = dataset.file.create_dataset(f"{CHECKSUMS}{dataset.name}", data=blocks, track_times=False)
        of_blocks.attrs["rows"] = rows
        of_blocks.attrs[checksums.NAME] = checksums.of_numbers([blocks])

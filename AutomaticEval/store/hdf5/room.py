"""How much a file can hold, by its own size. A file that says more is refused before memory is taken for it.

All datasets together are at most as large as the file, whatever it says of itself, and whichever of them lie on the same bytes.
Compressed datasets are at most EXPANSION times as large.
"""

from __future__ import annotations

import math

import h5py
import numpy as np

from AutomaticEval.store.hdf5 import contract

EXPANSION = 1024
"""The compressed datasets of a file may hold so many times its size, uncompressed. gzip makes at most 1,032 bytes of one, and less when
a chunk's entry in the file is counted too. zstd makes more only of rows that are all alike; the writer then fills the file up."""
MOST_WIDE = 2**31
"""The most numbers in a row: no dimension but the first is larger."""
REFERENCE = np.dtype([("length", "<u4"), ("address", "V8"), ("index", "V4")])
"""A text in its dataset: a reference to a text elsewhere in the file. Several references may name the same text."""


class Room:
    """How much of a file's size is not taken by datasets yet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken = self._compressed = 0

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError for more rows than the file has bytes, or for rows that no tensor can hold."""
        if shape and (shape[0] > self.size or max(shape[1:], default=0) > MOST_WIDE):
            raise ValueError(f"/{name} has shape {shape}, in a file of {self.size} bytes")

    def take(self, name: str, n_bytes: int) -> None:
        """Raises ValueError when a dataset's bytes are more than the file has beside the other datasets."""
        if self._taken + n_bytes > self.size:
            raise ValueError(
                f"/{name} says {n_bytes} bytes, which with {self._taken} of other datasets are more than the file of {self.size}"
            )
        self._taken += n_bytes

    def take_compressed(self, name: str, n_bytes: int) -> None:
        """Raises ValueError when a dataset's bytes, uncompressed, are more than a file of this size may hold beside the other datasets."""
        if self._compressed + n_bytes > EXPANSION * self.size:
            raise ValueError(
                f"/{name} says {n_bytes} bytes uncompressed, which with {self._compressed} of others are more than {EXPANSION} "
                f"times the file of {self.size}"
            )
        self._compressed += n_bytes


def text_bytes(raw: bytes) -> int:
    """Bytes of all texts that references name. A text that several references name counts each time. raw: the references, from the file."""
    return int(np.frombuffer(raw, REFERENCE)["length"].sum(dtype=np.int64))


def held_bytes(file: h5py.File) -> int:
    """Bytes that the compressed datasets of a file hold, uncompressed."""
    groups = [file.get(name, {}) for name in (contract.ROWS, contract.LINES)]
    every = [each for group in groups for each in group.values() if each.chunks is not None]
    return sum(math.prod(each.shape) * each.id.get_type().get_size() for each in every)

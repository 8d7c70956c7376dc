"""What a file may say that it holds, by its own size: what is read of it is allocated first.

Whatever a file says of itself, and whichever of its datasets lie on the same bytes, all of them together are at most as large as the
file; what is compressed is at most EXPANSION times as large.
"""

from __future__ import annotations

import math

import h5py
import numpy as np

EXPANSION = 1024
"""How many times the file's size its compressed datasets may hold, uncompressed. gzip makes of one byte 1,032 at most, a chunk's entry in the file included less; zstd more only of
rows that are all alike, for which the writer fills the file up."""
MOST_WIDE = 2**31
"""Numbers in a row, and so the largest dimension but the first."""
REFERENCE = np.dtype([("length", "<u4"), ("address", "V8"), ("index", "V4")])
"""A text as its dataset holds it: a reference into the file. Several references may name the same text."""


class Room:
    """What is left of a file's size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken = self._compressed = 0

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError for more rows than a file has bytes, or rows that no tensor holds."""
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
        """Raises ValueError when a dataset's bytes, uncompressed, are more than is allowed of a file so large."""
        if self._compressed + n_bytes > EXPANSION * self.size:
            raise ValueError(
                f"/{name} says {n_bytes} bytes uncompressed, which with {self._compressed} of others are more than {EXPANSION} "
                f"times the file of {self.size}"
            )
        self._compressed += n_bytes


def text_bytes(raw: bytes) -> int:
    """The length of all texts that references name; a text that several name counts each time. raw: the references as they lie in the file."""
    return int(np.frombuffer(raw, REFERENCE)["length"].sum(dtype=np.int64))


def held_bytes(file: h5py.File) -> int:
    """What the compressed datasets of a file hold, uncompressed."""
    every = [each for each in file.get("activations", {}).values() if each.chunks is not None]
    return sum(math.prod(each.shape) * each.id.get_type().get_size() for each in every)

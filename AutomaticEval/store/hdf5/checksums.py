"""Checksums as `docs/format.md` defines them: the 64-bit XXH3 of a dataset's elements, of its blocks, or of the root attributes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from AutomaticEval.store.bits import raw_bytes

NAME = "xxh3_64"
OF_ATTRIBUTES = "attributes_xxh3_64"
BLOCK_BYTES = 65536
"""Read in some microseconds, and hashed in a fraction of that."""


def rows_per_block(row_bytes: int) -> int:
    """How many rows a block has in a dataset that is not chunked: as many as fit into BLOCK_BYTES, at least one."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


class ArrayHash:
    """The checksum of an array that comes in slabs, each contiguous and little-endian, and those of its blocks.

    The slabs may begin and end anywhere. Both are taken of a block while it is in the processor's cache.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._whole, self._open = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._block_bytes, self._n_open = max(1, block_bytes), 0
        self._closed: list[int] = []

    def add(self, slab: np.ndarray[Any, Any]) -> None:
        view, at = raw_bytes(slab), 0
        while at < len(view):
            part = view[at : at + self._block_bytes - self._n_open]
            self._whole.update(part)
            if len(part) == self._block_bytes:
                self._closed.append(xxhash.xxh3_64_intdigest(part))
            else:
                self._add_to_open(part)
            at += len(part)

    def _add_to_open(self, part: memoryview) -> None:
        self._open.update(part)
        self._n_open += len(part)
        if self._n_open == self._block_bytes:
            self._closed.append(self._open.intdigest())
            self._open.reset()
            self._n_open = 0

    def hexdigest(self) -> str:
        """The checksum of all slabs that were added."""
        return self._whole.hexdigest()

    def blocks(self) -> np.ndarray[Any, Any]:
        """[n_blocks], uint64; the last block may be smaller."""
        return np.array([*self._closed, *([self._open.intdigest()] if self._n_open else [])], dtype="<u8")


def of_numbers(slabs: Iterable[np.ndarray[Any, Any]]) -> str:
    """The checksum of an array that comes in slabs."""
    hashed = xxhash.xxh3_64()
    for slab in slabs:
        hashed.update(raw_bytes(slab))
    return hashed.hexdigest()


def of_text(values: Iterable[str | bytes]) -> str:
    """The checksum of strings, each preceded by its length, so that no two lists of strings have the same bytes."""
    hashed = xxhash.xxh3_64()
    for value in values:
        raw = value.encode("utf-8") if isinstance(value, str) else value
        hashed.update(len(raw).to_bytes(8, "little"))
        hashed.update(raw)
    return hashed.hexdigest()


def of_attributes(attributes: Mapping[str, Any]) -> str:
    """The checksum of the root attributes, without this checksum itself."""
    text = json.dumps({name: str(value) for name, value in attributes.items() if name != OF_ATTRIBUTES}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8"))

"""Checksums as `docs/format.md` defines them: the 64-bit XXH3 of a dataset's elements, of its blocks, or of the root attributes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from AutomaticEval.store.bits import raw_bytes

NAME = "xxh3_64"
OF_ATTRIBUTES = "attributes_xxh3_64"
BLOCK_BYTES = 65536
"""A block of this size is read in some microseconds, and hashed in a fraction of that."""

_TEXTS = 1024
"""So many texts are hashed together."""


def rows_per_block(row_bytes: int) -> int:
    """Number of rows in a block of a dataset that is not chunked: as many as fit into BLOCK_BYTES, but at least one."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


class ArrayHash:
    """Computes the checksum of an array, and those of its blocks, while the array comes slab by slab.

    A slab is contiguous and little-endian, and may begin and end anywhere in a block. Both checksums are computed while the bytes are in
    the processor's cache.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._whole, self._open = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._block_bytes, self._n_open = max(1, block_bytes), 0
        self._closed: list[int] = []

    def add(self, slab: np.ndarray[Any, Any]) -> None:
        view, at = raw_bytes(slab), 0
        while at < len(view):
            in_block = view[at : at + self._block_bytes - self._n_open]
            self._whole.update(in_block)
            if len(in_block) == self._block_bytes:
                self._closed.append(xxhash.xxh3_64_intdigest(in_block))
            else:
                self._add_to_open(in_block)
            at += len(in_block)

    def _add_to_open(self, in_block: memoryview) -> None:
        self._open.update(in_block)
        self._n_open += len(in_block)
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
    """The checksum of an array, which comes slab by slab."""
    hashed = xxhash.xxh3_64()
    for slab in slabs:
        hashed.update(raw_bytes(slab))
    return hashed.hexdigest()


def of_text(values: Iterable[str | bytes]) -> str:
    """The checksum of strings. Each is hashed after its length, so that no two lists of strings give the same bytes."""
    hashed, waiting = xxhash.xxh3_64(), iter(values)
    while some := list(itertools.islice(waiting, _TEXTS)):
        raws = [value.encode("utf-8") if isinstance(value, str) else value for value in some]
        hashed.update(b"".join([part for raw in raws for part in (len(raw).to_bytes(8, "little"), raw)]))
    return hashed.hexdigest()


def of_attributes(attributes: Mapping[str, Any]) -> str:
    """The checksum of the root attributes, which leaves out the attribute that holds this checksum."""
    text = json.dumps({name: str(value) for name, value in attributes.items() if name != OF_ATTRIBUTES}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8"))

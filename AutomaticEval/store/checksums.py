"""Checksums as `docs/format.md` defines them: the 64-bit XXH3 of a dataset's elements, or of the root attributes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from AutomaticEval.store.format import raw_bytes

NAME = "xxh3_64"
OF_ATTRIBUTES = "attributes_xxh3_64"


class Running:
    """The checksum of an array that comes in pieces, each contiguous and little-endian."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, piece: np.ndarray[Any, Any]) -> None:
        self._hash.update(raw_bytes(piece))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def of_numbers(pieces: Iterable[np.ndarray[Any, Any]]) -> str:
    """Of an array that comes in pieces."""
    found = Running()
    for piece in pieces:
        found.add(piece)
    return found.hexdigest()


def of_text(values: Iterable[str | bytes]) -> str:
    """Of strings, each preceded by its length, so that no two lists of strings look the same."""
    found = xxhash.xxh3_64()
    for value in values:
        raw = value.encode("utf-8") if isinstance(value, str) else value
        found.update(len(raw).to_bytes(8, "little"))
        found.update(raw)
    return found.hexdigest()


def of_attributes(attributes: Mapping[str, Any]) -> str:
    """Of the root attributes but for this checksum itself."""
    text = json.dumps({name: str(value) for name, value in attributes.items() if name != OF_ATTRIBUTES}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8"))

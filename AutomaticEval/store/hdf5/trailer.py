"""The last bytes of a file: a checksum over everything in it that is not a plain array of numbers.

HDF5 does not check its own structures, and can loop for ever, or crash, over one flipped bit in them. This is read without
HDF5, before it. Knows nothing of what the arrays are.
"""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import xxhash

from AutomaticEval.store.disk.json_text import parse_json

MAGIC = b"AEvalEnd"
CHECKSUMS = "checksums"
"""The group with the checksums of blocks. They are few, and hashed with the rest: opening a file checks them."""
_END_BYTES = 16
_STEP = 8 * 2**20


def arrays_of(file: h5py.File) -> list[tuple[int, int]]:
    """(offset, size) of every contiguous dataset of numbers that has a checksum of its own."""
    arrays: list[tuple[int, int]] = []

    def look(name: str, item: Any) -> None:
        if name.startswith(f"{CHECKSUMS}/"):
            return
        if isinstance(item, h5py.Dataset) and h5py.check_string_dtype(item.dtype) is None:
            offset = item.id.get_offset()
            if offset is not None:
                arrays.append((offset, item.id.get_storage_size()))

    file.visititems(look)
    return sorted(arrays)


def write_trailer(path: Path, arrays: list[tuple[int, int]], least_bytes: int = 0) -> None:
    """Append the trailer to a file that HDF5 has closed. least_bytes: of the file, which spaces in the trailer fill up."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        text = json.dumps({"size": size, "arrays": arrays, "xxh3_64": _checksum(file, size, arrays)}).encode()
        text = text.ljust(least_bytes - size - _END_BYTES)
        file.seek(size)
        file.write(text + len(text).to_bytes(8, "little") + MAGIC)


def is_there(path: Path) -> bool:
    """Whether a file ends with a trailer."""
    with path.open("rb") as file:
        return _tail(file, path.stat().st_size)[8:] == MAGIC


def is_right(path: Path) -> bool:
    """Whether the bytes outside the arrays of numbers are those that were written."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(_tail(file, size)[:8], "little")
        start = size - _END_BYTES - length
        try:
            file.seek(start)
            said = parse_json(file.read(length).decode())
            arrays = [(int(offset), int(n_bytes)) for offset, n_bytes in said["arrays"]]
            return bool(
                said["size"] == start
                and _follow_one_another(arrays, start)
                and said["xxh3_64"] == _checksum(file, start, arrays)
            )
        except OSError as failure:
            if failure.errno not in (None, errno.EINVAL):  # the bytes may be sound
                raise
            return False
        except (ValueError, LookupError, TypeError, OverflowError):
            return False


def _tail(file: BinaryIO, size: int) -> bytes:
    file.seek(max(0, size - _END_BYTES))
    return file.read(_END_BYTES)


def _checksum(file: BinaryIO, size: int, arrays: list[tuple[int, int]]) -> str:
    hashed = xxhash.xxh3_64()
    for start, stop in _outside(size, arrays):
        file.seek(start)
        while start < stop:
            read = file.read(min(_STEP, stop - start))
            if not read:
                raise OSError("the file ends too soon")
            hashed.update(read)
            start += len(read)
    return hashed.hexdigest()


def _follow_one_another(arrays: list[tuple[int, int]], size: int) -> bool:
    """Whether no byte is in two of them, so that all are hashed once at most."""
    edges = [0, *(edge for offset, n_bytes in arrays for edge in (offset, offset + n_bytes)), size]
    return all(one <= other for one, other in itertools.pairwise(edges))


def _outside(size: int, arrays: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What lies between the arrays."""
    at = 0
    for offset, n_bytes in arrays:
        yield at, offset
        at = offset + n_bytes
    yield at, size

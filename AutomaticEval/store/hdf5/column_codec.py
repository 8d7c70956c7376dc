"""How the values of each column are written, and read back. `docs/format.md` says the same."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import h5py
import numpy as np

from AutomaticEval.errors import CaptureError
from AutomaticEval.samples import COLUMNS
from AutomaticEval.store.disk.json_text import as_json, parse_json
from AutomaticEval.store.ragged import Ragged

ENCODINGS = ("utf-8", "json", "int", "float", "bool")
ENCODED: dict[str, tuple[str, ...]] = {
    "text": ("utf-8", "json"),
    "json": ("json",),
    "int": ("int",),
    "float": ("float",),
    "bool": ("bool",),
}
"""The type of a column -> the encodings that it may have."""
NUMPY: dict[str, np.dtype[Any]] = {"int": np.dtype("<i8"), "float": np.dtype("<f8"), "bool": np.dtype("i1")}
"""The type of a column of numbers -> the dtype in which it is stored."""
_NONE, _NAN = 0x7FF8 << 48, (0x7FF8 << 48) + 1
"""The bits of a float that stands for None, and of one that is NaN. Older versions wrote _NONE for both."""


def encode_column(name: str, values: Sequence[Any]) -> tuple[np.ndarray[Any, Any] | list[str], str]:
    """A column's values as they are written, and its `encoding` attribute. Raises CaptureError for a value that is not of the column's type."""
    column_type = COLUMNS[name]
    if column_type == "json":
        return [as_json(value) for value in values], "json"
    if column_type == "text":
        return encode_text(["" if value is None else str(value) for value in values])
    if column_type == "bool" and any(value not in (None, False, True) for value in values):
        raise CaptureError(
            f"the column {name} holds {next(v for v in values if v not in (None, False, True))!r}, which is neither true nor false."
        )
    if column_type == "float":
        return _encoded_floats(values), column_type
    return np.array([-1 if value is None else value for value in values], dtype=NUMPY[column_type]), column_type


def _encoded_floats(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """None becomes the NaN of _NONE, and NaN that of _NAN, so that they are told apart when they are read."""
    is_none = np.array([value is None for value in values], dtype=bool)
    numbers = np.array([0.0 if value is None else value for value in values], dtype=NUMPY["float"])
    raw = numbers.view(np.uint64)
    raw[np.isnan(numbers)], raw[is_none] = _NAN, _NONE
    return numbers


def n_non_finite_floats(numbers: np.ndarray[Any, Any]) -> int:
    """How many of a column's encoded floats are infinite or NaN. None does not count."""
    return int(np.count_nonzero(~np.isfinite(numbers) & ~_is_none(numbers)))


def _is_none(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    is_none: np.ndarray[Any, Any] = np.isnan(numbers) & (np.ascontiguousarray(numbers).view(np.uint64) != _NAN)
    return is_none


def encode_lists(name: str, values: Sequence[Any]) -> Ragged:
    """A column of lists of numbers as they are written, float32; None becomes an empty list. Raises CaptureError for what is no `array` of float32."""
    for value in values:
        if value is not None and not (isinstance(value, array) and value.typecode == "f"):
            raise CaptureError(f"the column {name} holds {str(value)[:60]}, which is no array of float32 numbers.")
    offset = np.cumsum([0, *(0 if value is None else len(value) for value in values)], dtype=np.int64)
    parts = [np.frombuffer(value, np.float32) for value in values if value is not None and len(value)]
    return Ragged(offset, np.concatenate([np.empty(0, np.float32), *parts]))


def decoded_lists(lists: Ragged) -> list[array[float] | None]:
    """The lists as they were given, with None for an empty one."""
    raw, ends = np.asarray(lists.values[:], np.float32).tobytes(), (4 * (lists.offset - lists.offset[0])).tolist()
    return [array("f", raw[start:stop]) if stop > start else None for start, stop in pairwise(ends)]


def encode_text(values: Sequence[str]) -> tuple[list[str], str]:
    """Strings as they are written, and their `encoding`: unchanged, or all of them as JSON when HDF5 cannot hold one of them."""
    together = "".join(values)
    if "\0" not in together and _is_utf8(together):
        return list(values), "utf-8"
    return [json.dumps(value) for value in values], "json"


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def decode_texts(dataset: h5py.Dataset, at: Any = ()) -> list[str]:
    """The strings of a column of text, whole or at a slice. Raises ValueError for what cannot be decoded, and for JSON that is no text."""
    values = decode_column(dataset, at)
    if any(type(value) is not str for value in values):
        raise ValueError(f"{dataset.name} holds values that are no text")
    return values


def decode_column(dataset: h5py.Dataset, at: Any = ()) -> list[Any]:
    """A column's values, whole or at a slice, with None where none was written. Raises ValueError for what cannot be decoded."""
    return decoded(dataset[at], dataset.attrs["encoding"])


def decoded(raw: Any, encoding: str) -> list[Any]:
    """Values as they were given. raw: the values as they are written. Raises ValueError for an unknown encoding, and for what is no JSON."""
    if encoding not in ENCODINGS:
        raise ValueError(f"a column has the encoding {encoding!r}")
    if encoding in ("utf-8", "json"):
        texts = [value.decode("utf-8") if isinstance(value, bytes) else value for value in np.atleast_1d(raw).tolist()]
        return [parse_json(text) for text in texts] if encoding == "json" else texts
    values = np.atleast_1d(raw).tolist()
    if encoding == "float":
        nones = _is_none(np.atleast_1d(raw)).tolist()
        return [None if is_none else value for value, is_none in zip(values, nones, strict=True)]
    if encoding == "bool":
        return [None if value < 0 else bool(value) for value in values]
    return [None if value == -1 else value for value in values]

"""The file contract: names, dtypes and versions, as `docs/format.md` says. Owns how each value is encoded.

Knows nothing of models, of runs, or of when a file is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import torch

from AutomaticEval.errors import CaptureError
from AutomaticEval.samples import COLUMNS
from AutomaticEval.store.disk.parsing import is_too_deep, parse_json

SHARD_FORMAT = "automatic-eval/activations"
RUN_FORMAT = "automatic-eval/run"
VERSION = (1, 2)
TEXT = h5py.string_dtype()
_TEXT_TYPE = h5py.h5t.py_create(TEXT)

ENCODINGS = ("utf-8", "json", "int", "float", "bool")
ENCODED: dict[str, tuple[str, ...]] = {
    "text": ("utf-8", "json"),
    "json": ("json",),
    "int": ("int",),
    "float": ("float",),
    "bool": ("bool",),
}
"""Type of a column -> the encodings that it may have."""
NUMPY: dict[str, np.dtype[Any]] = {"int": np.dtype("<i8"), "float": np.dtype("<f8"), "bool": np.dtype("i1")}
"""The dtype in which each type of column is stored that holds numbers."""
_NONE, _NAN = 0x7FF8 << 48, (0x7FF8 << 48) + 1
"""The bits of a float that is absent, and of one that is not a number. Older versions wrote _NONE for both."""
_DTYPES = {
    torch.float64: h5py.h5t.IEEE_F64LE,
    torch.float32: h5py.h5t.IEEE_F32LE,
    torch.float16: h5py.h5t.IEEE_F16LE,
    torch.int8: h5py.h5t.STD_I8LE,
}


def shard_number(name: str) -> int:
    """`shard-00003.h5` -> 3. Raises ValueError for what is not the name of a shard, such as one in another folder."""
    found = re.fullmatch(r"shard-([0-9]+)\.h5", name)
    if found is None:
        raise ValueError(f"{name[:80]!r} is not a shard's name, such as shard-00000.h5")
    return int(found[1])


def dtype_named(name: str) -> torch.dtype:
    """The dtype of an activation dataset by its `dtype` attribute. Raises ValueError for one that there is not."""
    found = {str(dtype).removeprefix("torch."): dtype for dtype in (*_DTYPES, torch.bfloat16)}.get(name)
    if found is None:
        raise ValueError(f"no dtype {name!r}")
    return found


def hdf5_type(dtype: torch.dtype) -> h5py.h5t.TypeID:
    """The HDF5 type of an activation dtype; bfloat16 is HDF5's own, which h5py has no name for."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != torch.bfloat16:
        raise CaptureError(f"activations of dtype {dtype} cannot be stored; expected a floating dtype.")
    made = h5py.h5t.IEEE_F32LE.copy()
    made.set_fields(15, 7, 8, 0, 7)  # sign, exponent at and of, mantissa at and of
    made.set_size(2)
    made.set_ebias(127)
    return made


def attribute_of(item: h5py.HLObject, name: str) -> Any:
    """An attribute of one value, text or a whole number. Raises ValueError for another, which is not read; KeyError for none."""
    made = h5py.h5a.open(item.id, name.encode("utf-8", "surrogateescape"))
    one, stored = made.get_space().get_simple_extent_type() == h5py.h5s.SCALAR, made.get_type()
    if not one or stored.get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER):
        raise ValueError(f"the attribute {name} of {item.name} is neither one text nor one whole number")
    if stored.get_class() == h5py.h5t.INTEGER or not stored.is_variable_str():
        return item.attrs[name]
    found = np.empty((), dtype=TEXT)  # as h5py does, which asks for type and shape again
    made.read(found, mtype=_TEXT_TYPE)
    text = found[()]
    return text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text


def text_of(item: h5py.HLObject, name: str) -> str:
    """An attribute that is text. Raises ValueError for another, KeyError for none."""
    found = attribute_of(item, name)
    if not isinstance(found, str):
        raise ValueError(f"the attribute {name} of {item.name} is {found!r}, expected text")
    return found


def encode_column(name: str, values: Sequence[Any]) -> tuple[np.ndarray[Any, Any] | list[str], str]:
    """A column's values as they are written, and its `encoding` attribute."""
    kind = COLUMNS[name]
    if kind == "json":
        return [as_json(value) for value in values], "json"
    if kind == "text":
        return encode_text(["" if value is None else str(value) for value in values])
    if kind == "bool" and any(value not in (None, False, True) for value in values):
        raise CaptureError(
            f"the column {name} holds {next(v for v in values if v not in (None, False, True))!r}, which is neither true nor false."
        )
    if kind == "float":
        return _encoded_floats(values), kind
    return np.array([-1 if value is None else value for value in values], dtype=NUMPY[kind]), kind


def _encoded_floats(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """None is NaN, and NaN is another NaN."""
    is_none = np.array([value is None for value in values], dtype=bool)
    numbers = np.array([0.0 if value is None else value for value in values], dtype=NUMPY["float"])
    raw = numbers.view(np.uint64)
    raw[np.isnan(numbers)], raw[is_none] = _NAN, _NONE
    return numbers


def n_non_finite_floats(numbers: np.ndarray[Any, Any]) -> int:
    """How many of a column's encoded floats are infinite or NaN; None is neither."""
    return int(np.count_nonzero(~np.isfinite(numbers) & ~_is_none(numbers)))


def _is_none(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.isnan(numbers) & (np.ascontiguousarray(numbers).view(np.uint64) != _NAN)
    return found


def as_json(value: Any) -> str:
    """Any value as JSON. Keys that JSON does not have are text, and so is what holds itself or is nested too deep to be read."""
    try:
        text = json.dumps(value, default=plain)
    except (TypeError, ValueError, RecursionError):
        try:
            text = json.dumps(_with_text_keys(value), default=plain)
        except RecursionError:
            return json.dumps(str(value))
    return json.dumps(str(value)) if is_too_deep(text) else text


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(each) for key, each in value.items()}
    return [_with_text_keys(each) for each in value] if isinstance(value, list | tuple) else value


def plain(value: Any) -> Any:
    """For JSON: numbers of numpy or torch as Python's, anything else that it has no type for as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def attribute_text(text: str) -> str:
    """Text as a root attribute: HDF5 holds neither U+0000 nor lone surrogates, which stand there escaped (`\\udc80`)."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def encode_text(values: Sequence[str]) -> tuple[list[str], str]:
    """Strings as they are written: as they are, or as JSON when HDF5 cannot hold one of them."""
    if all("\0" not in value and _is_utf8(value) for value in values):
        return list(values), "utf-8"
    return [json.dumps(value) for value in values], "json"


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def decode_texts(dataset: h5py.Dataset, at: Any = ()) -> list[str]:
    """As `decode_column`, of text. Raises ValueError, also for JSON that is no text."""
    found = decode_column(dataset, at)
    if not all(isinstance(value, str) for value in found):
        raise ValueError(f"{dataset.name} holds values that are no text")
    return found


def decode_column(dataset: h5py.Dataset, at: Any = ()) -> list[Any]:
    """A column's values, whole or at a slice, with None where none was written. Raises ValueError."""
    return decoded(dataset[at], dataset.attrs["encoding"])


def decoded(raw: Any, encoding: str) -> list[Any]:
    """Values as they are written -> as they were given. Raises ValueError."""
    if encoding not in ENCODINGS:
        raise ValueError(f"a column has the encoding {encoding!r}")
    if encoding in ("utf-8", "json"):
        texts = [value.decode("utf-8") if isinstance(value, bytes) else value for value in np.atleast_1d(raw)]
        return [parse_json(text) for text in texts] if encoding == "json" else texts
    values = np.atleast_1d(raw).tolist()
    if encoding == "float":
        nones = _is_none(np.atleast_1d(raw)).tolist()
        return [None if is_none else value for value, is_none in zip(values, nones, strict=True)]
    if encoding == "bool":
        return [None if value < 0 else bool(value) for value in values]
    return [None if value == -1 else value for value in values]

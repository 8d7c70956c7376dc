"""The file contract in code, as `docs/format.md` says: the names of the formats, their version, and the types of activations.

Knows nothing of models, of runs, or of when a file is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import h5py
import torch

from AutomaticEval.errors import CaptureError
from AutomaticEval.reducing.table import is_by_sample
from AutomaticEval.samples import COLUMNS

SHARD_FORMAT = "automatic-eval/activations"
RUN_FORMAT = "automatic-eval/run"
VERSION = (1, 6)
TEXT = h5py.string_dtype()
ROWS, LINES = "activations", "reduced"
"""The groups of the sites: with a row for each token's position, or with a line for each sample."""
PROJECTIONS = "projections"
"""The group of the matrices by which rows were multiplied."""
EDITS = "edits"
"""The group of the values that the model was edited with."""
LISTS = tuple(name for name, kind in COLUMNS.items() if kind == "floats")
"""The columns with a number for each token of the response. Each is a group beside the sample table."""


_DTYPES = {
    torch.float64: h5py.h5t.IEEE_F64LE,
    torch.float32: h5py.h5t.IEEE_F32LE,
    torch.float16: h5py.h5t.IEEE_F16LE,
    torch.int8: h5py.h5t.STD_I8LE,
}


def shard_number(name: str) -> int:
    """`shard-00003.h5` -> 3. Raises ValueError for any other name, such as that of a shard in another folder."""
    match = re.fullmatch(r"shard-([0-9]+)\.h5", name)
    if match is None:
        raise ValueError(f"{name[:80]!r} is not a shard's name, such as shard-00000.h5")
    return int(match[1])


def group_of(settings: Mapping[str, Any]) -> str:
    """The group of the sites in a file with these settings, ROWS or LINES. Raises ValueError for a `reduce` that is no text."""
    name = settings.get("reduce")
    if not isinstance(name, str | None):
        raise ValueError(f"the setting reduce is {str(name)[:40]}, expected text")
    return LINES if is_by_sample(name) else ROWS


def place_of_matrix(name: str) -> tuple[str, str]:
    """The dataset of a matrix that stands beside the rows, and its type. Those of edits are named `edits/<digest>`; all others are of a projection."""
    return (name, "<f8") if name.startswith(f"{EDITS}/") else (f"{PROJECTIONS}/{name}", "<f4")


def place_of_column(name: str) -> str:
    """The dataset with the values of a column."""
    return f"{name}/values" if name in LISTS else f"samples/{name}"


def holds_sites(name: str) -> bool:
    """Whether a dataset of this name, without the first slash, holds the numbers of a site."""
    return name.startswith((f"{ROWS}/", f"{LINES}/"))


def dtype_named(name: str) -> torch.dtype:
    """The dtype that the `dtype` attribute of an activation dataset names. Raises ValueError for an unknown name."""
    dtype = {str(dtype).removeprefix("torch."): dtype for dtype in (*_DTYPES, torch.bfloat16)}.get(name)
    if dtype is None:
        raise ValueError(f"no dtype {name!r}")
    return dtype


def hdf5_type(dtype: torch.dtype) -> h5py.h5t.TypeID:
    """The HDF5 type of an activation dtype. h5py has no name for bfloat16, so that type is made here. Raises CaptureError for other dtypes."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != torch.bfloat16:
        raise CaptureError(f"activations of dtype {dtype} cannot be stored; expected a floating dtype.")
    bfloat16 = h5py.h5t.IEEE_F32LE.copy()
    bfloat16.set_fields(
        15, 7, 8, 0, 7
    )  # the sign's bit, the exponent's first bit and length, the mantissa's first bit and length
    bfloat16.set_size(2)
    bfloat16.set_ebias(127)
    return bfloat16

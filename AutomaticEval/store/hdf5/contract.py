"""The file contract: names, dtypes and versions, as `docs/format.md` says. Owns how each value is encoded.

Knows nothing of models, of runs, or of when a file is written.
"""

from __future__ import annotations

import re

import h5py
import torch

from AutomaticEval.errors import CaptureError

SHARD_FORMAT = "automatic-eval/activations"
RUN_FORMAT = "automatic-eval/run"
VERSION = (1, 2)
TEXT = h5py.string_dtype()


_DTYPES = {
    torch.float64: h5py.h5t.IEEE_F64LE,
    torch.float32: h5py.h5t.IEEE_F32LE,
    torch.float16: h5py.h5t.IEEE_F16LE,
    torch.int8: h5py.h5t.STD_I8LE,
}


def shard_number(name: str) -> int:
    """`shard-00003.h5` -> 3. Raises ValueError for what is not the name of a shard, such as one in another folder."""
    match = re.fullmatch(r"shard-([0-9]+)\.h5", name)
    if match is None:
        raise ValueError(f"{name[:80]!r} is not a shard's name, such as shard-00000.h5")
    return int(match[1])


def dtype_named(name: str) -> torch.dtype:
    """The dtype of an activation dataset by its `dtype` attribute. Raises ValueError for one that there is not."""
    dtype = {str(dtype).removeprefix("torch."): dtype for dtype in (*_DTYPES, torch.bfloat16)}.get(name)
    if dtype is None:
        raise ValueError(f"no dtype {name!r}")
    return dtype


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

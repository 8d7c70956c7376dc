"""Tensors as arrays of their raw bits, so that every dtype, also bfloat16, is stored and read back unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_BITS: dict[int, tuple[np.dtype[Any], torch.dtype]] = {
    8: (np.dtype("<u8"), torch.int64),
    4: (np.dtype("<u4"), torch.int32),
    2: (np.dtype("<u2"), torch.int16),
    1: (np.dtype("i1"), torch.int8),
}
"""Bytes of a number -> the type of its bits in numpy, and one as wide in torch."""


def bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The raw bits of a tensor as integers of the same width, unsigned but for one byte. They share a contiguous tensor's memory."""
    numpy_type, torch_type = _BITS[tensor.element_size()]
    return tensor.contiguous().view(torch_type).numpy().view(numpy_type)


def from_bits(raw: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """The tensor whose raw bits these are. It shares their memory."""
    signed = raw.view(np.dtype(f"<i{raw.dtype.itemsize}"))
    return torch.from_numpy(signed).view(dtype)


def raw_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of a contiguous array. They share its memory."""
    return array.reshape(-1).view(np.uint8).data


def bits_type(dtype: torch.dtype) -> np.dtype[Any]:
    """The type of array in which `bits` gives the numbers of a dtype."""
    return _BITS[torch.empty((), dtype=dtype).element_size()][0]

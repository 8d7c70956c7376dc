"""Activations in 8 bits: one scale for each channel over a block of rows.

A scale for each token ruins what most dimensions hold, because a few have values a hundred times larger
(`docs/decisions/0005-eight-bits.md` has the measured errors). Knows nothing of files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from AutomaticEval.errors import CaptureError

BLOCK_ROWS = 512
Array = np.ndarray[Any, Any]


def scales_of(block: Array) -> Array:
    """block: [at most BLOCK_ROWS, width], any floating dtype. Returns [1, width], float32.

    Raises CaptureError for values that are not finite.
    """
    largest = np.abs(block).max(axis=0, keepdims=True, initial=0).astype(np.float32)
    if not np.isfinite(largest).all():
        raise CaptureError("activations that are infinite or not a number cannot be stored as int8; use bfloat16.")
    scales: Array = largest / np.float32(127)
    return np.where(scales > 0, scales, np.float32(1))  # of the smallest numbers there are, a part may be zero


def quantized(block: Array) -> Array:
    """block: [n, width], with the scales of this very block. Returns int8 in -127..127."""
    integers: Array = np.rint(block.astype(np.float32) / scales_of(block)).clip(-127, 127).astype(np.int8)
    return integers


def restored(values: Array, scales: Array) -> Array:
    """values: int8 [n, width]. scales: [n, width], each row's. Returns float32 [n, width]."""
    return values.astype(np.float32) * scales

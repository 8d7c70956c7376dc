"""Arrays by name in a safetensors file, written whole or not at all, with a checksum, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from AutomaticEval.errors import StoreError
from AutomaticEval.store.disk.whole_files import new_file, prepare_file

Array = np.ndarray[Any, Any]
CHECKSUM = "xxh3_64"
"""The name of the checksum in a file's metadata."""


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as they are, to the last bit. Raises PathExists, FolderNotWritable, DiskFull."""
    prepare_file(path)
    whole = {name: np.ascontiguousarray(each) for name, each in arrays.items()}
    with new_file(path) as partial:
        save_file(whole, partial, {CHECKSUM: _checksum(whole)})


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a file. Raises StoreError for one that is not what its checksum says."""
    try:
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as failure:
        raise StoreError(f"{path} is damaged: it is no whole safetensors file ({failure}).") from None
    if metadata.get(CHECKSUM) != _checksum(arrays):
        raise StoreError(f"{path} is damaged: it is not what its checksum says.")
    return arrays


def _checksum(arrays: Mapping[str, Array]) -> str:
    whole = xxhash.xxh3_64()
    for name, each in sorted(arrays.items()):
        whole.update(f"{name} {each.dtype.str} {each.shape} ".encode())
        whole.update(each.tobytes())
    return whole.hexdigest()

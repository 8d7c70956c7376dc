"""Writes a run as npz files of numpy, one a shard."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from AutomaticEval.store.bits import raw_bytes
from AutomaticEval.store.export.outgoing import Advance
from AutomaticEval.store.export.shard_files import OutgoingTensor, write_shards
from AutomaticEval.store.run import Run

_NUMPY = {torch.float64: "<f8", torch.float32: "<f4", torch.int16: "<i2", torch.int32: "<i4", torch.float16: "<f2"}


def write(run: Run, folder: Path, dtypes: Mapping[str, torch.dtype], advance: Advance) -> None:
    """Write the folder."""
    write_shards("npz", _save, run, folder, dtypes, advance)


def _save(path: Path, tensors: Sequence[OutgoingTensor]) -> None:
    """Write a file that np.load reads. np.savez wants all arrays in memory at once."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for tensor in tensors:
            header = {"descr": _NUMPY[tensor.dtype], "fortran_order": False, "shape": tensor.shape}
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for slab in tensor.slabs():
                    file.write(raw_bytes(np.ascontiguousarray(slab)))

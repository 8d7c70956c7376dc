"""Writes a run as safetensors files, one a shard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from AutomaticEval.store.bits import raw_bytes
from AutomaticEval.store.export.outgoing import Advance
from AutomaticEval.store.export.shard_files import OutgoingTensor, write_shards
from AutomaticEval.store.run import Run

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def write(run: Run, folder: Path, dtypes: Mapping[str, torch.dtype], advance: Advance) -> None:
    """Write the folder."""
    write_shards("safetensors", save_safetensors, run, folder, dtypes, advance)


def save_safetensors(path: Path, tensors: Sequence[OutgoingTensor]) -> None:
    """Write a file that safetensors reads. Its own writer wants all tensors in memory at once."""
    ordered = sorted(
        tensors, key=lambda tensor: -tensor.dtype.itemsize
    )  # so that each begins at a multiple of the size of its numbers
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in ordered:
        offsets = [at, at := at + tensor.size_bytes]
        header[tensor.name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for slab in tensor.slabs():
                file.write(raw_bytes(np.ascontiguousarray(slab)))

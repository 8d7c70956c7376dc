"""A copy of a file or run in another dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from AutomaticEval.errors import SelectionError
from AutomaticEval.store.contents.changed import converted
from AutomaticEval.store.hdf5.damage import Advance, ignore
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.upkeep.copies import without_shards, write_copy
from AutomaticEval.store.upkeep.verify import check

FLOATS = ("float16", "bfloat16", "float32", "float64")


def convert(
    path: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    compression: str | None = None,
    advance: Advance = ignore,
) -> Path:
    """One file with the same samples in another dtype, such as float32 for viewers that cannot show bfloat16. Returns its path.

    dtype: one of FLOATS; None keeps each site's own. advance: is told how many bytes of activations were written.
    Raises SelectionError for an unknown dtype, CaptureError when a number does not fit into it, PathExists, DamagedFile.
    """
    if dtype is not None and dtype not in FLOATS:
        raise SelectionError(f"no dtype {dtype!r} to convert to; write {', '.join(FLOATS)}.")
    check(path)
    run = open_run(path)
    contents = without_shards(run.contents)
    if dtype is not None:
        before = run.settings.get("store_dtype") or run.settings.get("dtype")
        settings = {**run.settings, "store_dtype": dtype, "converted_from": before}
        contents = replace(converted(contents, getattr(torch, dtype)), settings=settings)
    return write_copy(destination, contents, compression, advance)

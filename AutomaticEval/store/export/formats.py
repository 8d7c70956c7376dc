"""Copies a run out to other tools: safetensors, npz, Hugging Face datasets, TransformerLens.

Knows nothing of how a run is written. Activations pass through slab by slab, or sample by sample, so that they are never all in
memory. The sample table is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from AutomaticEval.public_names import without_folders
from AutomaticEval.samples import IDS
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.disk.whole_files import ensure_space, new_folder
from AutomaticEval.store.export.outgoing import Advance
from AutomaticEval.store.export.table import FORMATS, Format, check_format
from AutomaticEval.store.hdf5.contract import dtype_named
from AutomaticEval.store.hdf5.damage import ignore
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.upkeep.verify import check


def export(path: Path, destination: Path, to: str, *, dtype: str | None = None, advance: Advance = ignore) -> Path:
    """Write a file or run as a new folder for other tools, which appears whole or not at all. Returns the folder.

    to: one of FORMATS. dtype: one of DTYPES, for all sites but ids; None keeps each site's own dtype, but writes float32 for int8, and for bfloat16 in a
    format that does not have it. advance: is called with the number of samples that were done since its last call.
    `run.json` holds the model and settings. The formats with a file a shard have `samples.jsonl`, with a line a sample in the
    run's order: its columns, token ids, and `rows`: [[file, start, stop], ...]. The other formats write rows that samples
    share once for each sample. For TransformerLens the tensors are named and shaped by `as_activation_cache`.
    Raises SelectionError, PathExists, DiskFull, UnreadableFile, StoreError, and CaptureError for a number that is too
    large for dtype.
    """
    check_format(to, dtype)
    check(path)
    run, destination = open_run(path), destination.expanduser()
    contents = run.contents
    chosen = FORMATS[to]
    if hasattr(chosen.writer, "check"):
        chosen.writer.check(run)
    dtypes = {key: _target(each.dtype, chosen, dtype) for key, each in contents.activations.items()}
    with new_folder(destination) as folder:
        ensure_space(destination, _size_bytes(contents, dtypes, each_sample=chosen.is_a_sample_at_a_time))
        (folder / "run.json").write_text(
            json.dumps({"model": without_folders(run.model), "settings": run.settings}, indent=2)
        )
        chosen.writer.write(run, folder, dtypes, advance)
    return destination


def _target(stored: torch.dtype, to: Format, dtype: str | None) -> torch.dtype:
    if stored == IDS:
        return stored
    if dtype is not None:
        return dtype_named(dtype)
    widened = stored == torch.int8 or (stored == torch.bfloat16 and not to.has_bfloat16)
    return torch.float32 if widened else stored


def _size_bytes(contents: Contents, dtypes: Mapping[str, torch.dtype], *, each_sample: bool) -> int:
    start, stop = contents.segments.values[:].T
    n_rows = int((stop - start).sum()) if each_sample else contents.n_rows
    return n_rows * sum(each.width * dtypes[key].itemsize for key, each in contents.activations.items())

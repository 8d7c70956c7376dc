"""How large files and runs are, for the progress that commands show."""

from __future__ import annotations

from pathlib import Path

from AutomaticEval.store.reader import open_run


def size_of(path: Path) -> int:
    """Bytes of activations in a file or run, before compression: the sum of what `advance` is told."""
    extents = [extent for shard in open_run(path).shards for extent in shard.extents.values()]
    return sum(extent.shape[0] * extent.row_bytes for extent in extents)


def files_of(path: Path) -> int:
    """Bytes of a file, or of the HDF5 files of a run folder, on the disk. Opens none; 0 when there is no such path."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.h5"))
    return path.stat().st_size if path.exists() else 0

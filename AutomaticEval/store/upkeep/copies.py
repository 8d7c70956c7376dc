"""A copy of samples in one new file, which appears whole or not at all: what merge, prune and convert write.

Rows pass through a few megabytes at a time, however large the copy is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from AutomaticEval.errors import StoreError
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.contents.file_contents import Activation, Contents
from AutomaticEval.store.disk.file_names import refuse_other_format
from AutomaticEval.store.disk.whole_files import ensure_space, prepare_file
from AutomaticEval.store.hdf5.damage import Advance
from AutomaticEval.store.hdf5.write import check_compression, write_file
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.run_folder import INDEX, shard_names


def without_shards(contents: Contents) -> Contents:
    """The contents without the columns that say in which shard of a run a sample is."""
    names = [name for name in contents.columns.names if name not in ("shard", "index")]
    return replace(contents, columns=Listed({name: contents.columns.whole(name) for name in names}))


def write_copy(destination: Path, contents: Contents, compression: str | None, advance: Advance) -> Path:
    """Write a file outside any run folder. Returns its path. advance: is told how many bytes of activations were written.

    Raises PathExists, FolderNotWritable, DiskFull, StoreError, SelectionError for an unknown compression.
    """
    check_compression(compression)
    destination = destination.expanduser()
    if (destination.parent / INDEX).exists() or shard_names(destination.parent):
        raise StoreError(f"{destination} would be inside a run folder; choose another folder.")
    refuse_other_format(destination)
    prepare_file(destination, offer="")
    row_bytes = sum(each.width * each.dtype.itemsize for each in contents.activations.values())
    ensure_space(destination.parent, 0 if compression else contents.n_rows * row_bytes)
    counted = {key: replace(each, slabs=_counting(each, advance)) for key, each in contents.activations.items()}
    write_file(destination, replace(contents, activations=counted), compression=compression)
    return destination


def _counting(activation: Activation, advance: Advance) -> Callable[[], Iterator[Array]]:
    def slabs() -> Iterator[Array]:
        for slab in activation.slabs():
            yield slab
            advance(slab.nbytes)

    return slabs

"""Opens a run: which shards it consists of, that each is this run's own, and what they hold together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from AutomaticEval.errors import NotActivations, StoreError, TruncatedFile
from AutomaticEval.store.contents.changed import reordered
from AutomaticEval.store.contents.columns import Columns, listed
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.hdf5 import contract
from AutomaticEval.store.hdf5.checksums import OF_ATTRIBUTES
from AutomaticEval.store.hdf5.column_codec import decode_texts
from AutomaticEval.store.hdf5.extents import naming
from AutomaticEval.store.hdf5.open import OneSite, OpenedFile
from AutomaticEval.store.hdf5.read import FileColumns, Shard
from AutomaticEval.store.hdf5.room import EXPANSION
from AutomaticEval.store.local_paths import ASKED
from AutomaticEval.store.reading.sharded_rows import ShardedRows
from AutomaticEval.store.run_folder import INDEX, not_replaced, shard_names, way_on
from AutomaticEval.store.shard_columns import ShardColumns, order_of

Open = Callable[..., Shard]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, opened."""

    rows: ShardedRows
    contents: Contents
    """All samples. The activations are in rows."""

    index: Shard | None
    """`run.h5`, unless it is missing or of version 1.0, which has the sample table alone."""

    finished: bool
    """Whether the run was evaluated to its end."""


def open_files(path: Path, *, check: bool) -> RunFiles:
    """The files of a run folder, or of a single file. check: hold what is read against its checksums.

    Raises UnreadableFile, StoreError.
    """
    opened = partial(Shard, check=check)
    if path.is_file():
        alone = opened(path)
        return RunFiles(ShardedRows.of([alone]), alone.contents(), None, finished=False)
    index = opened(path / INDEX, contract.RUN_FORMAT) if (path / INDEX).exists() else None
    finished = index is not None and index.attributes.get("state", "finished") == "finished"
    if index is not None and index.has_rows:
        return RunFiles(_listed_shards(path, index, opened, check=check), index.contents(), index, finished)
    rows, contents = _shards_there(path, index, opened)
    return RunFiles(rows, contents, None, finished)


def _listed_shards(folder: Path, index: Shard, opened: Open, *, check: bool) -> ShardedRows:
    """The rows of the shards that `run.h5` lists. Each must be there, and as large as it was."""
    with index.reading() as file:
        names = decode_texts(file["shards/name"])
        stamps = decode_texts(file[f"shards/{OF_ATTRIBUTES}"])
        counted = "n_lines" if index.is_by_sample else "n_rows"
        sizes, n_rows = (index.ints(f"shards/{name}")[:].tolist() for name in ("size_bytes", counted))
        if (
            not len(names) == len(stamps) == len(sizes) == len(n_rows)
            or sum(n_rows) != index.n_rows
            or min(n_rows, default=0) < 0
        ):
            raise ValueError("/shards does not add up to the rows")
        row_bytes = sum(extent.row_bytes for extent in index.extents.values())
        if row_bytes * index.n_rows > EXPANSION * sum(sizes):
            raise ValueError(f"its {index.n_rows} rows of {row_bytes} bytes are more than its shards can hold")
    _check_there(folder, names)
    for name, size in zip(names, sizes, strict=True):
        size_there = (folder / name).stat().st_size
        if size_there != size:
            raise TruncatedFile(
                f"{folder / name} has {size_there} bytes, not {size}: it is damaged; restore it from a copy."
            )
    return ShardedRows(
        index.row_formats,
        np.cumsum([0, *n_rows]),
        partial(_numbered, folder, names, stamps, opened),
        partial(_site_of, folder, names, stamps, check),
    )


def _numbered(folder: Path, names: Sequence[str], stamps: Sequence[str], opened: Open, number: int) -> Shard:
    """One of the shards that `run.h5` lists. It must be the very shard over which `run.h5` was made."""
    shard = opened(folder / names[number])
    _check_stamp(shard, stamps[number])
    return shard


def _site_of(folder: Path, names: Sequence[str], stamps: Sequence[str], check: bool, number: int, key: str) -> OneSite:
    """One site of one of them."""
    site = OneSite(folder / names[number], key, check=check)
    _check_stamp(site, stamps[number])
    return site


def _check_stamp(opened: OpenedFile, stamp: str) -> None:
    if opened.attributes.get(OF_ATTRIBUTES) != stamp:
        raise StoreError(f"{opened.path} is of another run, or another shard; restore this run's own from a copy.")


def _shards_there(folder: Path, index: Shard | None, opened: Open) -> tuple[ShardedRows, Contents]:
    """The shards of a run without `run.h5`, or with one of version 1.0, which has the sample table alone."""
    names = not_replaced(folder, shard_names(folder))
    if index is not None:
        with index.reading() as file:
            names = decode_texts(file["shards/name"])
    if not names:
        if (folder / ASKED).exists():
            raise NotActivations(
                f"{folder} is a run that has no samples yet, or was cut before any were written.{way_on(folder)}"
            )
        raise NotActivations(f"{folder} is not a run: it holds neither {INDEX} nor shard-*.h5.")
    _check_there(folder, names)
    run_id = (index or opened(folder / names[0])).made_with.run_id
    shards = [_of_run(opened(folder / name), run_id) for name in names]
    files = [shard.contents() for shard in shards]
    columns: Columns = listed(ShardColumns(shards)) if index is None else FileColumns(index)
    with naming(folder / INDEX):
        order = order_of(files, columns)
    return ShardedRows.of(shards), reordered(joined(files), order, columns)


def _check_there(folder: Path, names: Sequence[str]) -> None:
    with naming(folder / INDEX):
        if len(set(names)) < len(names):
            raise ValueError("it names a shard twice")
        for name in names:
            contract.shard_number(name)
    for name in names:
        if not (folder / name).exists():
            raise StoreError(f"{folder}: the shard {name} is missing; restore it from a copy, or run again.")


def _of_run(shard: Shard, run_id: Any) -> Shard:
    if shard.made_with.run_id != run_id:
        raise StoreError(f"{shard.path} is of another run; restore this run's own shard from a copy.")
    return shard

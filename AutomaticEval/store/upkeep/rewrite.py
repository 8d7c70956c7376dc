"""What is done to files and runs afterwards: verify, merge, prune, convert, and `run.h5` built again.

Nothing is changed in place but `run.h5`; what is made is a new file, whole or not at all. Rows pass through a few megabytes at a
time, whatever the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from AutomaticEval.errors import (
    AutomaticEvalError,
    DamagedFile,
    FileRefused,
    NotActivations,
    OtherSettings,
    SelectionError,
    StoreError,
)
from AutomaticEval.public_names import is_same
from AutomaticEval.selection import Positions
from AutomaticEval.settings import IDENTITY, differing
from AutomaticEval.sites import LayersLike, expand, parse_kinds, parse_layers
from AutomaticEval.store.contents.changed import converted, cut
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.contents.file_contents import Activation, Contents
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.disk.whole_files import ensure_space, prepare_file, prepare_folder
from AutomaticEval.store.hdf5 import contract
from AutomaticEval.store.hdf5.damage import Advance, ignore, verify_file
from AutomaticEval.store.hdf5.extents import Extent
from AutomaticEval.store.hdf5.write import check_compression, write_file
from AutomaticEval.store.ragged import Array, indices_of
from AutomaticEval.store.reader import Run, open_run
from AutomaticEval.store.run_folder import INDEX, delete_replaced, living, shard_names, tell_set_aside
from AutomaticEval.store.writer import locked, order_of, source_of, write_index

SAME = ("dtype", "store_dtype", "quantization", "revision", "sites", "layers", "positions", "shape", "edits", *IDENTITY)
"""The settings that runs must share to be joined: the model, what was changed in it, and the selection."""
FLOATS = ("float16", "bfloat16", "float32", "float64")


def size_of(path: Path) -> int:
    """Bytes of activations in a file or run: what `advance` adds up to."""
    run = open_run(path)
    return sum(_bytes(extent) for shard in run.shards for extent in shard.extents.values())


def _bytes(extent: Extent) -> int:
    return extent.shape[0] * extent.row_bytes


def files_of(path: Path) -> int:
    """Bytes of a file, or of the HDF5 files of a run folder, without opening any."""
    return sum(
        file.stat().st_size for file in (path.glob("*.h5") if path.is_dir() else [path] if path.exists() else [])
    )


def verify(path: Path, advance: Advance = ignore) -> list[str]:
    """What is wrong with a file or run, one line each, with the file and the dataset; empty when all is well.

    Every checksum is computed again, every sample's rows are compared with its tokens, and of a run every shard must be
    there and be its own. Raises StoreError when there is no such path.
    """
    if not path.exists():
        raise StoreError(f"no file or run folder {path}.")
    if path.is_file() and path.name == INDEX:
        path = path.parent
    if path.is_file():
        return verify_file(path, contract.SHARD_FORMAT, advance)
    tell_set_aside(path)
    problems: list[str] = []
    if (path / INDEX).exists():
        problems += verify_file(path / INDEX, contract.RUN_FORMAT, advance)
    for name in shard_names(path):
        problems += verify_file(path / name, contract.SHARD_FORMAT, advance)
    if problems:
        return problems
    try:
        run = open_run(path, check=False)  # all of it was checked just now
        problems += _verify_places(run)
        listed = {shard.path.name for shard in run.shards}
        names = shard_names(path)
        strays = [name for name in living(path, names) if name not in listed] if listed < set(names) else []
        problems += [f"{path / name}: it is there and no part of the run" for name in strays]
    except (NotActivations, FileRefused):
        raise
    except AutomaticEvalError as failure:
        problems.append(str(failure))
    return problems


def check(path: Path) -> None:
    """Raises DamagedFile when anything is wrong: a copy gets checksums of its own, which would hide it."""
    problems = verify(path)
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DamagedFile(f"{problems[0]}{rest}. Nothing was copied from it; restore it from a copy.")


def _verify_places(run: Run) -> list[str]:
    """Samples of `run.h5` that are not those of the shards it names."""
    shards = run.shards  # each is checked to be of this run, with its rows
    parts = [replace(shard.contents(), columns=Listed({})) for shard in shards]
    try:
        order = order_of(parts, run.contents.columns)
    except ValueError as stray:
        return [f"{run.path / INDEX}: {stray}"]
    theirs, ours = joined(parts).segments.take(order), run.contents.segments
    wrong = theirs.first_difference(ours)
    if wrong is None:
        return []
    number, index = (run.column(name)[wrong] for name in ("shard", "index"))
    return [f"{run.path / INDEX}: sample {wrong} has not the rows of sample {index} of {shards[number].path.name}"]


def rebuild_index(folder: Path) -> Path:
    """Write `run.h5` again from the shards that are there; what an earlier one said of the samples is kept.

    Returns its path. Raises FolderInUse, StoreError, UnreadableFile.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a run folder.")
    open_run(folder)  # before a lock is left in what is no run
    try:
        check(folder)
    except DamagedFile as damaged:
        raise DamagedFile(
            f"{damaged} If it is {INDEX} alone, delete that: the run is then read without its scores."
        ) from None
    prepare_folder(folder)
    lock = locked(folder)
    try:
        run = open_run(folder)
        sources = [source_of(shard) for shard in run.shards]
        write_index(folder, sources, run.shards, Listed.of(run.records()), finished=run.finished)
        delete_replaced(folder)
    finally:
        lock.release()
    return folder / INDEX


def merge(
    paths: Sequence[Path], destination: Path, *, compression: str | None = None, advance: Advance = ignore
) -> Path:
    """One file that holds all samples of one or more runs of the same model and selection.

    Raises OtherSettings when they are not, StoreError when two hold the same request, PathExists.
    """
    for path in paths:
        check(path)
    runs = [open_run(path) for path in paths]
    _check_joinable(runs)
    held = _alone(joined([run.contents for run in runs], _joined_settings(runs)))
    return _write(destination, held, compression, advance)


def _check_joinable(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        apart = differing(f"{first.path} and {run.path}", first.settings, run.settings, SAME)
        if not (is_same(run.model, first.model) or is_same(first.model, run.model)) or apart:
            named = ", ".join(f"{name} {one!r} and {other!r}" for name, one, other in apart)
            raise OtherSettings(
                f"{first.path} and {run.path} are not of the same model and selection: "
                f"{named or f'{first.model} and {run.model}'}."
            )
    seen: dict[tuple[Any, ...], int] = {}
    for number, run in enumerate(runs):
        for record in run.records() if len(runs) > 1 else ():
            key = tuple(record.get(name) for name in ("task", "doc_id", "choice", "repeat"))
            if None not in key[:2] and seen.setdefault(key, number) != number:
                other = runs[seen[key]].path
                raise StoreError(f"{other} and {run.path} both hold {key[0]} document {key[1]}; leave one out.")


def _joined_settings(runs: Sequence[Run]) -> dict[str, Any]:
    """What all runs say; where they differ, under `merged` what each says."""
    every = [run.settings for run in runs]
    same = {name: value for name, value in every[0].items() if all(one.get(name) == value for one in every)}
    if len(runs) == 1:
        return same
    return {**same, "merged": [{name: one[name] for name in one if name not in same} for one in every]}


def _alone(held: Contents) -> Contents:
    """Without the columns that say where in a run a sample is."""
    names = [name for name in held.columns.names if name not in ("shard", "index")]
    return replace(held, columns=Listed({name: held.columns.whole(name) for name in names}))


def prune(
    path: Path,
    destination: Path,
    *,
    sites: str | None = None,
    layers: LayersLike = None,
    positions: str | None = None,
    compression: str | None = None,
    advance: Advance = ignore,
) -> Path:
    """A smaller copy in one file: only some sites, layers or positions.

    sites, layers, positions: as for a capture, and `pattern` where it is stored; None keeps what there is.
    Raises SelectionError when one of them was not stored, PathExists.
    """
    check(path)
    run = open_run(path)
    held = _alone(run.contents)
    keys = kept_keys(run, sites, layers)
    wanted = None if positions in (None, "all") else Positions.parse(str(positions))
    kept = [_kept_rows(held, number, wanted) for number in range(held.n_samples)]
    chosen = {"sites": sites, "layers": None if layers is None else str(layers), "positions": wanted and str(wanted)}
    now = {name: value for name, value in chosen.items() if value is not None}
    before = {name: run.settings.get(name) for name in now}
    if before.get("positions") not in (None, "all", now.get("positions")):  # of what was stored, not of everything
        now["positions"] = f"{now['positions']} of {before['positions']}"
    settings = {**run.settings, **now, "pruned_from": [*run.settings.get("pruned_from", []), before]}
    return _write(destination, replace(cut(held, kept, keys), settings=settings), compression, advance)


def kept_keys(run: Run, sites: str | None, layers: LayersLike) -> list[str]:
    """The stored keys that are asked for: of these kinds, and of these layers what a model has once a layer.

    Raises SelectionError for a kind or layer of which nothing is stored.
    """
    stored = {key: _parts(key) for key in run.keys}
    kinds = {kind for kind, _ in stored.values()} if sites is None else _kinds_of(sites, stored)
    of_kinds = {key: layer for key, (kind, layer) in stored.items() if kind in kinds}
    found = {layer for layer in of_kinds.values() if layer is not None}
    wanted = found if parse_layers(layers) is None else _layers_of(run, layers, stored)
    missing = [kind for kind in kinds if kind not in {kind for kind, _ in stored.values()}]
    missing += [f"layer {layer}" for layer in sorted(wanted - found) if found or not of_kinds]
    if missing:
        raise SelectionError(f"{run.path} holds none of these: {', '.join(missing)}; it has {', '.join(run.keys)}.")
    return [key for key, layer in of_kinds.items() if layer is None or layer in wanted]


def _parts(key: str) -> tuple[str, int | None]:
    """(kind, layer) of a stored key, also of one that is not captured by name, such as `layer_3.pattern`."""
    head, _, kind = key.partition(".")
    number = head.removeprefix("layer_")
    if number == head or not number.isdecimal():
        return ("embed" if key == "embeddings" else key), None
    return kind or "resid_post", int(number)


def _kinds_of(sites: str, stored: Mapping[str, tuple[str, int | None]]) -> set[str]:
    """The kinds that are named. Raises UnknownSite for what is neither stored nor a kind."""
    names = [name.strip() for name in sites.split(",")]
    there = {kind for kind, _ in stored.values()}
    others = [name for name in names if name not in there]
    return {*(name for name in names if name in there), *(parse_kinds(others) if others else ())}


def _layers_of(run: Run, layers: LayersLike, stored: Mapping[str, tuple[str, int | None]]) -> set[int]:
    """The layers that are named. Raises UnknownLayer for one that the model does not have."""
    deepest = max((layer for _, layer in stored.values() if layer is not None), default=-1)
    n_layers = run.settings.get("shape", {}).get("n_layers", deepest + 1)
    return {site.layer or 0 for site in expand(["resid_post"], layers, n_layers)} if n_layers else set()


def _kept_rows(held: Contents, number: int, wanted: Positions | None) -> Array:
    rows = indices_of(held.segments.item(number))
    if wanted is None:
        return rows
    places = wanted.resolve(len(held.input_ids.item(number)), len(held.generated_ids.item(number)))
    kept: Array = rows[np.isin(held.positions[rows] if len(rows) else rows, list(places))]
    return kept


def convert(
    path: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    compression: str | None = None,
    advance: Advance = ignore,
) -> Path:
    """One file with the same samples in another dtype: float32 for viewers that cannot show bfloat16.

    Raises SelectionError for an unknown dtype, CaptureError when a value does not fit into it, PathExists.
    """
    if dtype is not None and dtype not in FLOATS:
        raise SelectionError(f"no dtype {dtype!r} to convert to; write {', '.join(FLOATS)}.")
    check(path)
    run = open_run(path)
    held = _alone(run.contents)
    if dtype is not None:
        changed = converted(held, getattr(torch, dtype))
        before = run.settings.get("store_dtype") or run.settings.get("dtype")
        held = replace(changed, settings={**run.settings, "store_dtype": dtype, "converted_from": before})
    return _write(destination, held, compression, advance)


def _write(destination: Path, held: Contents, compression: str | None, advance: Advance) -> Path:
    check_compression(compression)
    destination = destination.expanduser()
    if (destination.parent / INDEX).exists() or shard_names(destination.parent):
        raise StoreError(f"{destination} would be inside a run folder; choose another folder.")
    prepare_file(destination, offer_overwrite=False)
    row_bytes = sum(each.width * each.dtype.itemsize for each in held.activations.values())
    ensure_space(destination.parent, 0 if compression else held.n_rows * row_bytes)
    told = {key: replace(each, slabs=_telling(each, advance)) for key, each in held.activations.items()}
    write_file(destination, replace(held, activations=told), compression=compression)
    return destination


def _counted(slabs: Iterator[Array], advance: Advance) -> Iterator[Array]:
    for slab in slabs:
        yield slab
        advance(slab.nbytes)


def _telling(activation: Activation, advance: Advance) -> Callable[[], Iterator[Array]]:
    return lambda: _counted(activation.slabs(), advance)

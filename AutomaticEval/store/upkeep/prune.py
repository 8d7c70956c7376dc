"""A smaller copy of a file or run: only some sites, layers or positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from AutomaticEval.errors import SelectionError
from AutomaticEval.selection import Positions
from AutomaticEval.sites import LayersLike, expand, parse_kinds, parse_layers
from AutomaticEval.store.contents.changed import cut
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.hdf5.damage import Advance, ignore
from AutomaticEval.store.ragged import Array, indices_of
from AutomaticEval.store.reader import Run, open_run
from AutomaticEval.store.upkeep.copies import without_shards, write_copy
from AutomaticEval.store.upkeep.verify import check


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
    """A smaller copy in one file: only some sites, layers or positions. Returns its path.

    sites, layers, positions: as for a capture, and `pattern` where it is stored; None keeps what there is. advance: is told how many
    bytes of activations were written.
    Raises SelectionError when one of them was not stored, PathExists, DamagedFile.
    """
    check(path)
    run = open_run(path)
    contents = without_shards(run.contents)
    keys = kept_keys(run, sites, layers)
    wanted = None if positions in (None, "all") else Positions.parse(str(positions))
    rows = [_kept_rows(contents, number, wanted) for number in range(contents.n_samples)]
    chosen = {"sites": sites, "layers": None if layers is None else str(layers), "positions": wanted and str(wanted)}
    now = {name: value for name, value in chosen.items() if value is not None}
    before = {name: run.settings.get(name) for name in now}
    if before.get("positions") not in (None, "all", now.get("positions")):  # of what was stored, not of everything
        now["positions"] = f"{now['positions']} of {before['positions']}"
    settings = {**run.settings, **now, "pruned_from": [*run.settings.get("pruned_from", []), before]}
    return write_copy(destination, replace(cut(contents, rows, keys), settings=settings), compression, advance)


class StoredSite(NamedTuple):
    """A stored key, taken apart."""

    kind: str
    layer: int | None
    """None for a kind that a model has once."""


def kept_keys(run: Run, sites: str | None, layers: LayersLike) -> list[str]:
    """The stored keys that are asked for: of these kinds, and of these layers where a model has the kind once a layer.

    Raises SelectionError for a kind or layer of which nothing is stored.
    """
    stored = {key: _stored_site(key) for key in run.keys}
    stored_kinds = {site.kind for site in stored.values()}
    kinds = stored_kinds if sites is None else _kinds_of(sites, stored_kinds)
    of_kinds = {key: site.layer for key, site in stored.items() if site.kind in kinds}
    stored_layers = {layer for layer in of_kinds.values() if layer is not None}
    wanted = stored_layers if parse_layers(layers) is None else _layers_of(run, layers, stored)
    missing = [kind for kind in kinds if kind not in stored_kinds]
    missing += [f"layer {layer}" for layer in sorted(wanted - stored_layers) if stored_layers or not of_kinds]
    if missing:
        raise SelectionError(f"{run.path} holds none of these: {', '.join(missing)}; it has {', '.join(run.keys)}.")
    return [key for key, layer in of_kinds.items() if layer is None or layer in wanted]


def _stored_site(key: str) -> StoredSite:
    """Takes a stored key apart, also one that is not captured by name, such as `layer_3.pattern`."""
    head, _, kind = key.partition(".")
    number = head.removeprefix("layer_")
    if number == head or not number.isdecimal():
        return StoredSite("embed" if key == "embeddings" else key, None)
    return StoredSite(kind or "resid_post", int(number))


def _kinds_of(sites: str, stored_kinds: set[str]) -> set[str]:
    """The kinds that are named. Raises UnknownSite for a name that is neither stored nor a kind."""
    names = [name.strip() for name in sites.split(",")]
    others = [name for name in names if name not in stored_kinds]
    return {*(name for name in names if name in stored_kinds), *(parse_kinds(others) if others else ())}


def _layers_of(run: Run, layers: LayersLike, stored: Mapping[str, StoredSite]) -> set[int]:
    """The layers that are named. Raises UnknownLayer for one that the model does not have."""
    deepest = max((site.layer for site in stored.values() if site.layer is not None), default=-1)
    n_layers = run.settings.get("shape", {}).get("n_layers", deepest + 1)
    return {site.layer or 0 for site in expand(["resid_post"], layers, n_layers)} if n_layers else set()


def _kept_rows(contents: Contents, number: int, wanted: Positions | None) -> Array:
    """The numbers of the rows of a sample that are kept. wanted: the positions; None keeps all."""
    rows = indices_of(contents.segments.item(number))
    if wanted is None:
        return rows
    places = wanted.resolve(len(contents.input_ids.item(number)), len(contents.generated_ids.item(number)))
    kept: Array = rows[np.isin(contents.positions[rows] if len(rows) else rows, list(places))]
    return kept

"""A smaller copy of a file or run: only some sites, layers or positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from AutomaticEval.errors import SelectionError
from AutomaticEval.selection import Positions
from AutomaticEval.sites import LayersLike, Site, expand, kind_and_layer, parse_layers, parse_sites, refuse_layers_twice
from AutomaticEval.store.contents.changed import cut
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.thinking_in import ThinkingIn
from AutomaticEval.store.hdf5.damage import Advance, ignore
from AutomaticEval.store.ragged import Array, indices_of
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.reading.reduced_runs import how_reduced
from AutomaticEval.store.run import Run
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
    if wanted is not None and contents.is_by_sample:
        raise SelectionError(
            f"{path} holds {how_reduced(run.settings)}, which cannot be taken for {wanted} alone any more."
        )
    thinking = ThinkingIn(contents) if wanted is not None and wanted.needs_thinking else None
    rows = [_kept_rows(contents, number, wanted, thinking) for number in range(contents.n_samples)]
    chosen = {"sites": sites, "layers": None if layers is None else str(layers), "positions": wanted and str(wanted)}
    now = {name: value for name, value in chosen.items() if value is not None}
    before = {name: run.settings.get(name) for name in now}
    if before.get("positions") not in (None, "all", now.get("positions")):  # of what was stored, not of everything
        now["positions"] = f"{now['positions']} of {before['positions']}"
    made = run.made_with
    settings = made.changed(**now, pruned_from=[*(made.pruned_from or []), before]).as_dict()
    return write_copy(destination, replace(cut(contents, rows, keys), settings=settings), compression, advance)


def kept_keys(run: Run, sites: str | None, layers: LayersLike) -> list[str]:
    """The stored keys that are asked for: of these kinds, and of these layers where each layer has the kind.

    Raises SelectionError for a kind or layer of which nothing is stored.
    """
    stored = {key: kind_and_layer(key) for key in run.keys}
    kinds, single = _chosen(sites, stored)
    refuse_layers_twice(single, layers)
    of_kinds = {key: layer for key, (kind, layer) in stored.items() if kind in kinds}
    stored_layers = {layer for layer in of_kinds.values() if layer is not None}
    wanted = stored_layers if parse_layers(layers) is None else _layers_of(run, layers, stored)
    missing = [kind for kind in kinds if kind not in {kind for kind, _ in stored.values()}]
    missing += [site.key for site in single if site not in stored.values()]
    missing += [f"layer {layer}" for layer in sorted(wanted - stored_layers) if stored_layers or not of_kinds]
    if missing:
        raise SelectionError(f"{run.path} holds none of these: {', '.join(missing)}; it has {', '.join(run.keys)}.")
    return [
        key
        for key, site in stored.items()
        if site in single or (key in of_kinds and (site.layer is None or site.layer in wanted))
    ]


def _chosen(sites: str | None, stored: Mapping[str, Site]) -> tuple[set[str], set[Site]]:
    """The kinds that are named, and the sites of single layers. Raises UnknownSite for what is neither stored nor a kind."""
    there = {site.kind for site in stored.values()}
    if sites is None:
        return there, set()
    named = [kind_and_layer(name.strip()) for name in sites.split(",")]
    others = [site for site in named if site.kind not in there]
    if others:
        parse_sites(others)
    return {site.kind for site in named if site.layer is None}, {site for site in named if site.layer is not None}


def _layers_of(run: Run, layers: LayersLike, stored: Mapping[str, Site]) -> set[int]:
    """The layers that are named. Raises UnknownLayer for one that the model does not have."""
    deepest = max((site.layer for site in stored.values() if site.layer is not None), default=-1)
    n_layers = (run.made_with.shape or {}).get("n_layers", deepest + 1)
    return {site.layer or 0 for site in expand(["resid_post"], layers, n_layers)} if n_layers else set()


def _kept_rows(contents: Contents, number: int, wanted: Positions | None, thinking: ThinkingIn | None) -> Array:
    """The numbers of the rows of a sample that are kept. wanted: the positions; None keeps all. thinking: for positions that need it."""
    rows = indices_of(contents.segments.item(number))
    if wanted is None:
        return rows
    n_prompt, n_response = len(contents.input_ids.item(number)), len(contents.generated_ids.item(number))
    places = wanted.resolve(n_prompt, n_response, None if thinking is None else thinking.of(number))
    kept: Array = rows[np.isin(contents.positions[rows] if len(rows) else rows, list(places))]
    return kept

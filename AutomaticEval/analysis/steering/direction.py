"""`Direction`: a vector that is added at one site of a model, where it comes from, and its file."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from AutomaticEval import __version__
from AutomaticEval.analysis.steering.direction_file import ALONE, Stored, read_vectors, write_vectors
from AutomaticEval.errors import EditError, SelectionError, UnreadableFile
from AutomaticEval.models.edit import Edit
from AutomaticEval.selection import Positions
from AutomaticEval.sites import TABLE, Site, kind_and_layer, parse_site


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector at one site of a model, and where it comes from.

    >>> direction = difference_of_means(run, "resid_post.14", label="correct")
    >>> direction.save("rightness.safetensors")
    >>> with editing("gpt2", load_direction("rightness.safetensors").edit(4)) as model: ...

    Raises UnknownSite, SelectionError for a layer that is missing or one too many, EditError for a vector that cannot be a direction.
    """

    vector: Tensor = field(repr=False)
    """[width], float32, on the CPU. Whatever is like a vector is taken: a tensor, an array, a list of numbers."""

    site: str
    """The kind of the site, such as resid_post. With its layer (layer_14, resid_post.14), `layer` is left out."""

    layer: int | None = None
    """None for sites that a model has once, such as embed."""

    made_by: str = "code"
    """How it was made, in words."""

    made_from: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from, as far as it is known: models, runs, position, label, n_true, n_false, mean_norm, edits. Values are those of JSON."""

    def __post_init__(self) -> None:
        site = parse_site(self.site)
        if site.layer is not None and self.layer is not None and site.layer != self.layer:
            raise SelectionError(
                f"the site {self.site} names layer {site.layer}, and layer {self.layer} was given, too."
            )
        layer = self.layer if site.layer is None else site.layer
        is_per_layer = TABLE[site.kind].is_per_layer
        if (layer is None) == is_per_layer or (layer is not None and not _is_layer(layer)):
            wanted = "each layer has it: give its layer, counted from 0" if is_per_layer else "a model has it once"
            raise SelectionError(f"a direction at {site.kind} was given the layer {layer}; {wanted}.")
        object.__setattr__(self, "vector", _checked(self.vector))
        object.__setattr__(self, "site", site.kind)
        object.__setattr__(self, "layer", None if layer is None else int(layer))

    @property
    def at(self) -> Site:
        """Where it is added."""
        return Site(self.site, self.layer)

    @property
    def norm(self) -> float:
        """The L2 norm of the vector, in units of the site."""
        return float(self.vector.double().norm())

    @property
    def digest(self) -> str:
        """A hash of the site and of every number of the vector."""
        return hashlib.sha256(self.at.key.encode() + self.vector.numpy().tobytes()).hexdigest()[:16]

    @property
    def told(self) -> str:
        """The direction in a line: where it is added, how long it is, and what it was made of."""
        mean_norm = self.made_from.get("mean_norm")
        beside = f" (rows that it was made of: {mean_norm:.4g} on average)" if isinstance(mean_norm, float) else ""
        return f"{self.at.key}, norm {self.norm:.4g}{beside}; {self.made_by}"

    def edit(self, scale: float = 1.0, positions: str | slice | Positions | None = None) -> Edit:
        """The edit that adds scale times the vector, as it is stored: it is not brought to length 1. positions: as in `Edit`."""
        return Edit.add(self.at, scale * self.vector, positions=positions)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a direction file, ending in .safetensors. Raises PathExists, StoreError."""
        save_directions(path, [self], overwrite=overwrite)


def save_directions(path: str | Path, directions: Sequence[Direction], *, overwrite: bool = False) -> None:
    """Write one direction, or one for each of several sites, into a file. Raises PathExists, StoreError."""
    names = [ALONE] if len(directions) == 1 else [each.at.key for each in directions]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    stored = {}
    for name, each in zip(names, directions, strict=True):
        said = {
            "site": each.site,
            "layer": each.layer,
            "norm": each.norm,
            "made_by": each.made_by,
            "made_from": dict(each.made_from),
        }
        stored[name] = Stored(each.vector, {**said, "created": created, "version": __version__})
    write_vectors(Path(path).expanduser(), stored, overwrite=overwrite)


def load_direction(path: str | Path, *, site: str | None = None, layer: int | None = None) -> Direction:
    """The direction in a file, checked.

    path: a direction file, or a safetensors or .npy file of other code with one vector, which needs `site` and `layer`. Of a file with several layers,
    `layer` takes one. Raises UnreadableFile, DamagedFile, NewerFormat; SelectionError for a site or layer that is not the file's; EditError for
    a vector that cannot be a direction.
    """
    found = load_directions(path, site=site, layers=None if layer is None else [layer])
    if len(found) > 1:
        raise SelectionError(f"{path} holds directions of {_named(found)}; say which one with layer=.")
    return found[0]


def load_directions(
    path: str | Path, *, site: str | None = None, layers: Sequence[int] | None = None
) -> list[Direction]:
    """The directions in a file, or those of some layers; a vector of other code is taken in each of the layers. Raises as `load_direction`."""
    path = Path(path).expanduser()
    stored = read_vectors(path)
    where = {name: _site_in_file(name, each) for name, each in stored.items()}
    if None in where.values():
        return _of_other_code(path, stored, site, layers)
    found = [_made(path, each, place, {}) for each, place in zip(stored.values(), where.values(), strict=True) if place]
    if site is not None and {parse_site(site).kind} != {each.site for each in found}:
        raise SelectionError(
            f"{path} holds a direction of {_named(found)}, and the site {site} was asked for. Leave the site out, or save the vector for that site: "
            "dataclasses.replace(direction, site=…).save(…)."
        )
    wanted = {parse_site(site).layer} if site is not None and parse_site(site).layer is not None else set(layers or ())
    missing = sorted(wanted - {each.layer for each in found}, key=str)
    if missing:
        raise SelectionError(
            f"{path} holds a direction of {_named(found)}, and layer {', '.join(map(str, missing))} was asked for. Leave the layer out, or save the vector "
            "for that layer: dataclasses.replace(direction, layer=…).save(…)."
        )
    return [each for each in found if not wanted or each.layer in wanted]


def _site_in_file(name: str, stored: Stored) -> Site | None:
    """Where the file says that a vector belongs: in its metadata or, in a file of other code, by the name of the tensor. None: it does not say."""
    if stored.about is not None:
        return Site(stored.about["site"], stored.about["layer"])
    site = kind_and_layer(name)
    return site if site.layer is not None and site.kind in TABLE else None


def _of_other_code(
    path: Path, stored: Mapping[str, Stored], site: str | None, layers: Sequence[int] | None
) -> list[Direction]:
    """A file's one vector, at the site and in the layers that are given. Raises UnreadableFile for several vectors, SelectionError without a place."""
    if len(stored) > 1:
        raise UnreadableFile(
            f"{path} holds {len(stored)} vectors ({', '.join(list(stored)[:3])}, …) and does not say their sites; name the tensors layer_14, layer_15, …, "
            "or write one vector a file."
        )
    if site is None:
        raise SelectionError(
            f"{path} does not say where its vector belongs; give its site and layer, such as resid_post and 14."
        )
    place, (vector,) = parse_site(site), stored.values()
    if place.layer is None and TABLE[place.kind].is_per_layer and not layers:
        raise SelectionError(f"{path} does not say in which layer its vector belongs; give its layer, such as 14.")
    places = [place] if not layers else [Site(place.kind, layer) for layer in layers]
    if layers and place.layer is not None and list(layers) != [place.layer]:
        raise SelectionError(f"the site {site} names its layer, and layers were given, too; leave one of them out.")
    return [_made(path, vector, each, {"file": path.name}) for each in places]


def _made(path: Path, stored: Stored, place: Site, made_from: Mapping[str, Any]) -> Direction:
    about = stored.about or {"made_by": "a file without provenance", "made_from": made_from}
    try:
        return Direction(stored.vector, place.kind, place.layer, about["made_by"], about["made_from"])
    except (EditError, SelectionError) as wrong:
        raise type(wrong)(f"{path}: {wrong}") from None


def _named(found: Sequence[Direction]) -> str:
    return ", ".join(each.at.key if each.layer is None else f"{each.site} in layer {each.layer}" for each in found)


def _is_layer(layer: object) -> bool:
    return isinstance(layer, numbers.Integral) and not isinstance(layer, bool) and int(layer) >= 0


def _checked(given: Any) -> Tensor:
    """[width], float32, a copy on the CPU. Raises EditError for what is no vector, for numbers that are not finite, and for zeros."""
    try:
        vector = torch.as_tensor(given).detach().to("cpu", torch.float32).clone()
    except (TypeError, ValueError, RuntimeError) as failure:
        raise EditError(f"a direction is a vector of numbers; found {type(given).__name__} ({failure}).") from None
    if vector.dim() != 1 or not len(vector):
        raise EditError(f"a direction is a vector [width]; found the shape {list(vector.shape)}.")
    n_wrong = int((~vector.isfinite()).sum())
    if n_wrong:
        raise EditError(
            f"{n_wrong} of the {len(vector)} numbers of the direction are infinite or NaN (as float32); nothing can be added with them."
        )
    if not vector.any():
        raise EditError("all numbers of the direction are 0: it points nowhere.")
    return vector

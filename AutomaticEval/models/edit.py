"""`Edit`: one intervention at one site, or at one kind of site in several layers. `editing.py` makes it while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from AutomaticEval.errors import EditError, unknown_option
from AutomaticEval.models.edited_positions import positions_of
from AutomaticEval.models.recording import Keep
from AutomaticEval.selection import Positions
from AutomaticEval.sites import TABLE, LayersLike, Site, expand, kind_and_layer, parse_site, refuse_layers_twice

ROUTER = "router_logits"
DROP_EXPERTS, ONLY_EXPERTS = "drop_experts", "only_experts"
"""The names of the edits that leave some experts. The `experts` of the second are those that it leaves."""


class AtTokens(TypedDict, total=False):
    """At which tokens an edit is made: fields of `Edit`."""

    positions: str | slice | Positions | None
    where: Keep | None


class Where(AtTokens, total=False):
    """Where an edit is made within its site: the keywords of most constructors, which are the fields of `Edit`."""

    layers: LayersLike
    heads: Sequence[int] | None
    experts: Sequence[int] | None


@dataclass(frozen=True)
class Edit:
    """One intervention at one site.

    >>> with editing(model, [Edit.scale("layer_3.z", 0.0, heads=[5])]):  # head 5 of layer 3 is ablated
    ...     model.generate(**inputs, max_new_tokens=15)
    >>> with editing(model, Edit.add("resid_post", vector, layers="10-14", positions="response")):  # steered from its first own token on
    ...     model.generate(**inputs, max_new_tokens=15)
    """

    site: str | Site
    """A site, or its key: layer_3.z, layer_3 (the residual stream after block 3), embeddings, logits. With `layers` a kind: z, resid_post."""

    change: Callable[[Tensor], Tensor]
    """Takes the values and returns new ones of the same shape, without changing in place what it was given. The shape is
    [batch, columns, width]; with `where` or `positions` [n, width]. With `heads` the last axis is two: [..., n heads, d_head]."""

    heads: Sequence[int] | None = None
    """The heads of z or q, or the key-value heads of k or v, that are changed. None changes the whole width."""

    where: Keep | None = None
    """where(first column, number of columns) -> the (row, column) pairs of a forward that are changed. None changes all of them."""

    is_positionwise: bool = False
    """Whether the new values of a position depend on its own values alone. When they do not, or when there is a `where` or are `positions`, lm-eval's
    requests are run in lm-eval's own batches: computing once what requests share would make the edit in other rows and columns."""

    is_fixed: bool = False
    """Whether `change` is operations of tensors alone, the same in every forward: no number is read back, nothing is remembered. Only then can
    answers be generated from a graph, which does not call it again."""

    name: str = "change"
    """What the edit does, for the settings of runs that are made with it."""

    value: Tensor | float | None = None
    """What the edit is made with, for the settings of those runs."""

    positions: str | slice | Positions | None = None
    """The tokens that are changed, padding never among them. prompt; response: the tokens of the answer, as they are fed; scored: the last token of
    the prompt, and the response; last: the last token of the prompt. A slice is one of the prompt (slice(-4, None) or "-4:"), unless it names its part:
    "response[:8]". None changes every column."""

    layers: LayersLike = None
    """The layers of a kind of site: 14, "10-14", range(4), -1. None: the site says its layer itself."""

    experts: Sequence[int] | None = None
    """The experts whose numbers are changed, at router_logits: `change` is given [..., n experts]. None changes all of them."""

    def __post_init__(self) -> None:
        chosen = None if self.positions is None else positions_of(self.positions)
        if chosen is not None and self.where is not None:
            raise EditError("an edit was given where and positions; leave one of them out.")
        object.__setattr__(self, "positions", None if chosen == Positions() else chosen)
        site = kind_and_layer(self.site) if isinstance(self.site, str) else self.site
        if site.kind == ROUTER:  # whether experts can be chosen is looked at, which no graph records
            object.__setattr__(self, "is_fixed", False)

    @property
    def is_by_position(self) -> bool:
        """Whether the edit depends on rows or columns, and not on each position's own values alone."""
        return self.where is not None or self.positions is not None or not self.is_positionwise

    def in_layers(self, n_layers: int) -> list[Edit]:
        """This edit for each of its layers, in a model of n_layers. Raises UnknownSite, UnknownLayer, SelectionError, EditError."""
        if self.layers is None:
            return [self]
        site = parse_site(self.site)
        refuse_layers_twice([site], self.layers)
        if not TABLE[site.kind].is_per_layer:
            raise EditError(f"layers were given for {site.kind}, which a model has once; leave them out.")
        return [replace(self, site=each, layers=None) for each in expand([site], self.layers, n_layers)]

    @classmethod
    def replace(cls, site: str | Site, value: Tensor | float, **at: Unpack[Where]) -> Edit:
        """Put a value in the place of what is there.

        value: a number, or a tensor that is broadcast to what is changed: [width]; [n heads, d_head] or [d_head] with `heads`; without `positions`
        and `where` also [batch, columns, width]. at: `layers`, `heads`, `positions`, `where`, as the fields of `Edit`.
        Raises EditError, UnknownPositions for positions that cannot be read.
        """
        like = _moved(value)
        return cls(site, lambda old: like(old).expand_as(old).clone(), **_of_value("replace", value, at))

    @classmethod
    def add(cls, site: str | Site, value: Tensor | float, **at: Unpack[Where]) -> Edit:
        """Add a value, in units of the site: a steering vector [width] times its strength.

        value and at: as in `replace`. Raises EditError, UnknownPositions for positions that cannot be read.
        """
        like = _moved(value)
        return cls(site, lambda old: old + like(old), **_of_value("add", value, at))

    @classmethod
    def scale(cls, site: str | Site, factor: float, **at: Unpack[Where]) -> Edit:
        """Multiply by a factor; 0.0 gives zeros, also where a value is infinite or NaN.

        at: as in `replace`. Raises EditError, UnknownPositions for positions that cannot be read.
        """

        def scaled(old: Tensor) -> Tensor:
            return torch.zeros_like(old) if factor == 0 else old * factor

        return cls(site, scaled, **_of_value("scale", float(factor), at))

    @classmethod
    def project_out(cls, site: str | Site, direction: Tensor, **at: Unpack[Where]) -> Edit:
        """Take away the part along a direction of any length.

        direction: [width] or, with `heads`, [d_head]. at: as in `replace`.
        Raises EditError for a direction of length zero, or of no finite length; UnknownPositions for positions that cannot be read.
        """
        direction = torch.as_tensor(direction)
        length = float(direction.double().norm())
        if not 0 < length < float("inf"):
            raise EditError(f"the direction to project out of {site} has the length {length}; it needs one.")

        of_length_1 = _moved((direction.double() / length).float())

        def without(old: Tensor) -> Tensor:
            wide = old.float()
            unit = of_length_1(wide)
            return (wide - (wide * unit).sum(-1, keepdim=True) * unit).to(old.dtype)

        return cls(site, without, **_of_value("project_out", direction, at))

    @classmethod
    def drop_experts(cls, layers: LayersLike, experts: Sequence[int], **at: Unpack[AtTokens]) -> Edit:
        """Keep the routers of some layers from choosing some experts: their logits become -inf, and the router goes on by its own rule.

        layers: 1, "2-5", range(4); None for all. experts: their numbers, from 0. at: `positions` or `where`, as the fields of `Edit`.
        When a model is run, this raises EditError for a layer without experts, for an expert that it does not have, and when fewer are left than each token has.
        """
        edit = cls.replace(ROUTER, -inf, layers=_all(layers), experts=_numbers(experts), **at)
        return replace(edit, name=DROP_EXPERTS, value=None)

    @classmethod
    def only_experts(cls, layers: LayersLike, experts: Sequence[int], **at: Unpack[AtTokens]) -> Edit:
        """Keep the routers of some layers from choosing any other experts than these, as `drop_experts` does for the others.

        layers, experts, at, errors: as in `drop_experts`.
        """
        kept = _numbers(experts)

        def without_others(old: Tensor) -> Tensor:
            is_other = torch.ones(old.shape[-1], dtype=torch.bool, device=old.device)
            is_other[list(kept)] = False
            return old.masked_fill(is_other, -inf)

        edit = cls.add(ROUTER, 0.0, layers=_all(layers), experts=kept, **at)
        return replace(edit, change=without_others, name=ONLY_EXPERTS, value=None)


def _all(layers: LayersLike) -> LayersLike:
    return "all" if layers is None else layers


def _numbers(experts: Sequence[int]) -> tuple[int, ...]:
    """Experts, ascending and each once. Raises EditError for what is no list of numbers, and for none."""
    numbers = [experts] if isinstance(experts, int) else list(experts)
    if (
        not numbers
        or isinstance(experts, str)
        or any(isinstance(one, bool) or not isinstance(one, int) for one in numbers)
    ):
        raise EditError(f"experts are {experts!r}; write a list of numbers, such as [0, 3].")
    return tuple(sorted(set(numbers)))


def _of_value(name: str, value: Tensor | float, at: Where) -> dict[str, Any]:
    """The fields of an edit that is made with a value. It is positionwise when the value is the same at all positions.

    Raises TypeError for an unknown keyword.
    """
    for unknown in at.keys() - Where.__annotations__.keys():
        raise unknown_option(unknown, Where.__annotations__)
    own_axes = 1 if at.get("heads") is None else 2  # experts have one number each
    is_positionwise = not isinstance(value, Tensor) or value.dim() <= own_axes
    return {"name": name, "value": value, "is_positionwise": is_positionwise, "is_fixed": True, **at}


def _moved(value: Tensor | float) -> Callable[[Tensor], Tensor]:
    """Gives a value on the device and in the dtype of a tensor.

    It is copied to a device once, and again when it was changed in place: each copy waits for the device, and no graph can record one.
    """
    copies: dict[tuple[torch.device, torch.dtype], tuple[int, Tensor]] = {}

    def like(old: Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.device == old.device:
            return value.to(old.dtype)
        version = 0 if not isinstance(value, Tensor) or value.is_inference() else value._version
        place = (old.device, old.dtype)
        if place not in copies or copies[place][0] != version:
            copies[place] = (version, torch.as_tensor(value).to(device=old.device, dtype=old.dtype))
        return copies[place][1]

    return like

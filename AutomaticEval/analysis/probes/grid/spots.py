"""A site at a position: where probes read a row of each question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Spot(NamedTuple):
    """Where a probe reads."""

    name: str
    """`layer_14`; of several positions, `layer_14 at prompt[-2]`."""

    site: str
    position: str


def spots_of(sites: Iterable[str], positions: Sequence[str]) -> list[Spot]:
    """Each site at each position, site by site."""
    is_grid = len(positions) > 1
    return [Spot(f"{site} at {each}" if is_grid else site, site, each) for site in sites for each in positions]


def positions_in(position: str | Sequence[str]) -> tuple[str, ...]:
    """One position, or several: a sequence, or with commas. Each once."""
    given = position.split(",") if isinstance(position, str) else map(str, position)
    return tuple(dict.fromkeys(each.strip() for each in given))

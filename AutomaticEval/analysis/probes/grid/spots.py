"""A site at a position: where probes read a row of each question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from AutomaticEval.errors import SelectionError


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
    """One position, or several: a sequence, or with commas. Each once. Raises SelectionError for what is no text, such as the number of a stored row."""
    given = position.split(",") if isinstance(position, str) else position
    if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
        raise SelectionError(f'position is {position!r}; write one, "prompt[-1]", or several, ["prompt[-1]", "last"].')
    return tuple(dict.fromkeys(each.strip() for each in given))

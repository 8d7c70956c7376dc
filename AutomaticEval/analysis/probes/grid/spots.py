"""A site at a position: where probes read a row of each question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from AutomaticEval.errors import SelectionError, UnknownPositions
from AutomaticEval.store.questions.response_tokens import is_in_prompt

OF_ONE_TOKEN = "write a position of one token: prompt[-1], prompt[-3], response[0], answer[0], exact_answer[-1] or last"


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
    """One position, or several: a sequence, or with commas. Each once. Raises SelectionError for what is no text, UnknownPositions for what is no position."""
    given = position.split(",") if isinstance(position, str) else position
    if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
        raise SelectionError(f'position is {position!r}; write a text, or a list of texts, such as "prompt[-1]".')
    positions = tuple(dict.fromkeys(each.strip() for each in given))
    for each in positions:
        _refuse_unknown(each)
    return positions


def _refuse_unknown(position: str) -> None:
    try:
        is_in_prompt(position)
    except UnknownPositions:
        raise UnknownPositions(f"no positions {position!r}; {OF_ONE_TOKEN}.") from None

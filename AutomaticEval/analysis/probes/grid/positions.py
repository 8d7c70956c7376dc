"""The usual positions of a grid: those of the prompt's end and of the response that every question has a row of, and why others are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.errors import StoreError
from AutomaticEval.store.questions.questions import Questions

Array = np.ndarray[Any, Any]
MOST_OF_PROMPT = 8
"""So many tokens of the prompt's end are usual."""


@dataclass(frozen=True)
class LeftOut:
    """A position that is not in the grid."""

    position: str
    n_without: int
    """Questions that have no row there, over all runs; 0 where the rows are those of another position."""

    reason: str


@dataclass(frozen=True)
class Grid:
    """The positions at which every site is probed."""

    positions: tuple[str, ...]
    """In the order of a text."""

    left_out: tuple[LeftOut, ...] = ()


def grid_of(several: Sequence[Questions]) -> Grid:
    """The usual positions that every question of several runs has. Raises StoreError for runs that have fewer than two such positions."""
    kept: dict[str, list[Array]] = {}
    left_out: list[LeftOut] = []
    for position in _of_prompt():
        if not _taken(position, several, kept, left_out):
            break  # no earlier token is asked for, so that one line says it
    kept = dict(reversed(kept.items()))
    for position in _of_response(several):
        _taken(position, several, kept, left_out)
    if len(kept) < 2:
        told = "; ".join(f"{each.position}: {each.reason}" for each in left_out)
        raise StoreError(
            f"a grid needs two positions or more that every question has, and {several[0].source.path} has {', '.join(kept) or 'none'} ({told}). Capture more "
            "(--positions all), or probe one position, without grid."
        )
    return Grid(tuple(kept), tuple(left_out))


def _of_prompt() -> Iterator[str]:
    return (f"prompt[-{number}]" for number in range(1, MOST_OF_PROMPT + 1))


def _of_response(several: Sequence[Questions]) -> list[str]:
    """Those of generated answers, if there are any; with thinking, its ends apart from the answer's."""
    is_generated = any(not all(each.column("logprobs")) for each in several)
    if not is_generated:
        return []
    thinks = any(text for each in several for text in each.column("thinking"))
    of_thinking = ["thinking[0]", "thinking[-1]", "answer[0]"] if thinks else []
    return ["response[0]", *of_thinking, "exact_answer[0]", "exact_answer[-1]", "response[-1]"]


def _taken(position: str, several: Sequence[Questions], kept: dict[str, list[Array]], left_out: list[LeftOut]) -> bool:
    """Whether a position is in the grid; else why not is noted."""
    there = [each.has(position) for each in several]
    n_without = sum(int((~each).sum()) for each in there)
    if n_without:
        left_out.append(LeftOut(position, n_without, _reason(position, several, there, n_without)))
        return False
    rows = [each.row_numbers(position) for each in several]
    for name, others in kept.items():
        if all(np.array_equal(one, other) for one, other in zip(rows, others, strict=True)):
            left_out.append(LeftOut(position, 0, f"its rows are those of {name}"))
            return False
    kept[position] = rows
    return True


def _reason(position: str, several: Sequence[Questions], there: Sequence[Array], n_without: int) -> str:
    """Whether the questions have no such token, or the run did not keep its row."""
    n_no_token = sum(int((each.positions(position) < 0).sum()) for each in several)
    n = sum(map(len, there))
    if n_no_token:
        dropped = f", and of {n_without - n_no_token} more the row was not stored" if n_without > n_no_token else ""
        has_choices = any(any(each.column("logprobs")) for each in several) and not position.startswith("prompt")
        return f"{n_no_token} of {n} questions have {'choices, or ' * has_choices}no such token that was fed{dropped}"
    return f"the row of {n_without} of {n} questions was not stored"

"""The mean norm of a run's rows by layer and position: counted from the prompt's start, and from its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.ragged import indices_of

Array = np.ndarray[Any, Any]
MOST_POSITIONS = 32
"""So many positions from each end of the prompt."""
_ROWS_AT_ONCE = 2**14


class Norms(NamedTuple):
    """Mean norms; NaN where no row was kept."""

    from_start: Array
    """[n_places, n_positions]: positions 0, 1, …"""

    from_end: Array
    """[n_places, n_positions]: positions …, -2, -1 of the prompt."""

    n_from_start: Array
    """[n_positions]: of how many questions."""

    n_from_end: Array


def norms(questions: Questions, keys: Sequence[str], advance: Callable[[int], None]) -> Norms:
    """Of the rows in the prompt of each question's first choice. advance: is told of each place that is done."""
    rows, start, end = _places_in_prompts(questions)
    distinct, inverse = np.unique(rows, return_inverse=True)
    tables: list[tuple[Array, Array]] = []
    counts = [_counted(each, np.ones(len(rows))) for each in (start, end)]
    for key in keys:
        array = questions.source.rows(key, distinct)
        lengths = np.empty(len(distinct))
        for at in range(0, len(distinct), _ROWS_AT_ONCE):
            lengths[at : at + _ROWS_AT_ONCE] = array[at : at + _ROWS_AT_ONCE].double().norm(dim=1).numpy()
        sums = [_counted(each, lengths[inverse]) for each in (start, end)]
        means = [
            np.divide(total, n, out=np.full(MOST_POSITIONS, np.nan), where=n > 0)
            for total, n in zip(sums, counts, strict=True)
        ]
        tables.append((means[0], means[1]))
        advance(1)
    from_start, from_end = (np.stack(each) for each in zip(*tables, strict=True))
    return Norms(from_start, from_end[:, ::-1], counts[0].astype(int), counts[1][::-1].astype(int))


def _counted(places: Array, weights: Array) -> Array:
    """[MOST_POSITIONS]: the sum of the weights at each place; places beyond are left out."""
    inside = (places >= 0) & (places < MOST_POSITIONS)
    return np.bincount(places[inside], weights[inside], MOST_POSITIONS)


def _places_in_prompts(questions: Questions) -> tuple[Array, Array, Array]:
    """The rows near either end of the prompts of the first choices: their numbers, their position, and how far they are from the prompt's last token."""
    contents, of = questions.source.contents, questions.samples
    first = np.asarray(of.values[:])[of.offset[:-1]]
    segments = contents.segments.take(first)
    ranges = np.asarray(segments.values[:]).reshape(-1, 2)
    ends = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])])[segments.offset]
    rows = indices_of(ranges)
    n_prompt = np.repeat(np.diff(contents.input_ids.offset)[first], np.diff(ends))
    distinct, inverse = np.unique(rows, return_inverse=True)
    position = np.asarray(contents.positions[distinct] if len(distinct) else distinct)[inverse]
    from_end = n_prompt - 1 - position
    near = (from_end >= 0) & ((position < MOST_POSITIONS) | (from_end < MOST_POSITIONS))
    return rows[near], position[near], from_end[near]

"""Which stored row of each sample is meant by "last", by a number, or by a position of the sequence such as "prompt[-1]"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from AutomaticEval.errors import StoreError
from AutomaticEval.selection import Positions
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.ragged import Array, indices_of


def row_numbers(path: Path, contents: Contents, samples: Sequence[int], position: str | int) -> Array:
    """[n_samples]: the number of one row of each sample.

    path: of the run, for messages. samples: their numbers in contents. position: "last" or "first" of the sample's stored rows, a number
    among them, or one position of the sequence: "prompt[-1]", "response[0]".
    Raises StoreError for a sample without that row.
    """
    if not isinstance(position, str | int):
        raise StoreError(f'position is {position!r}; write one: "last", "first", a number, "prompt[-1]".')
    by_name: dict[str | int, int] = {"last": -1, "first": 0}
    place = by_name.get(position, position)
    if isinstance(place, int):
        return np.array([_stored_row(path, contents, number, place) for number in samples], dtype=np.int64)
    parsed = Positions.parse(place)
    return np.array([_row_at(path, contents, number, parsed) for number in samples], dtype=np.int64)


def _stored_row(path: Path, contents: Contents, number: int, index: int) -> int:
    """The row with an index among a sample's stored rows."""
    rows = indices_of(contents.segments.item(number))
    if not -len(rows) <= index < len(rows):
        raise StoreError(f"{path}: sample {number} has {len(rows)} rows, no row {index}.")
    return int(rows[index])


def _row_at(path: Path, contents: Contents, number: int, positions: Positions) -> int:
    """The row at the one position of a sample's sequence that is asked for."""
    wanted = positions.resolve(len(contents.input_ids.item(number)), len(contents.generated_ids.item(number)))
    if not wanted:
        raise StoreError(
            f"sample {number} has no position {positions}: the last token of a response is never fed. Leave such "
            'samples out with where, or ask for one that each has: "prompt[-1]".'
        )
    if len(wanted) != 1:
        raise StoreError(f'{positions} are {len(wanted)} positions of sample {number}; ask for one: "prompt[-1]".')
    rows = indices_of(contents.segments.item(number))
    matching = rows[contents.positions[rows] == wanted[0]]
    if len(matching) != 1:
        raise StoreError(f"{path}: position {wanted[0]} ({positions}) of sample {number} was not stored.")
    return int(matching[0])

"""Which stored row of each sample is meant by "last", by a number, or by a position of the sequence such as "prompt[-1]"."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from AutomaticEval.errors import StoreError
from AutomaticEval.selection import Positions
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.thinking_in import ThinkingIn
from AutomaticEval.store.ragged import Array, indices_of

_SLAB_ROWS = 2**20
"""So many positions are in memory together, or those of one sample."""


def row_numbers(path: Path, contents: Contents, samples: Array, position: str | int) -> Array:
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
        return np.array([_stored_row(path, contents, number, place) for number in samples.tolist()], dtype=np.int64)
    parsed = Positions.parse(place)
    lengths = (np.diff(ids.offset)[samples].tolist() for ids in (contents.input_ids, contents.generated_ids))
    thinking = ThinkingIn(contents) if parsed.needs_thinking else None
    sizes = zip(samples.tolist(), *lengths, strict=True)
    wanted = [_only(parsed, number, n_prompt, n_response, thinking) for number, n_prompt, n_response in sizes]
    return rows_at(path, contents, samples, np.array(wanted, dtype=np.int64), str(parsed))


def _stored_row(path: Path, contents: Contents, number: int, index: int) -> int:
    """The row with an index among a sample's stored rows."""
    rows = indices_of(contents.segments.item(number))
    if not -len(rows) <= index < len(rows):
        raise StoreError(f"{path}: sample {number} has {len(rows)} rows, no row {index}.")
    return int(rows[index])


def _only(positions: Positions, number: int, n_prompt: int, n_response: int, thinking: ThinkingIn | None) -> int:
    """The one position of a sample's sequence that is asked for. thinking: None for positions that do not need it."""
    wanted = positions.resolve(n_prompt, n_response, None if thinking is None else thinking.of(number))
    if not wanted:
        raise StoreError(
            f"sample {number} has no position {positions}: its prompt has {n_prompt} tokens, and {n_response - 1 if n_response else 0} of its "
            f"{n_response} response tokens were fed (the last one never is). Leave such samples out with where, or ask for a position that each "
            'has: "prompt[-1]".'
        )
    if len(wanted) != 1:
        raise StoreError(f'{positions} are {len(wanted)} positions of sample {number}; ask for one: "prompt[-1]".')
    return wanted[0]


def rows_at(path: Path, contents: Contents, samples: Array, wanted: Array, name: str) -> Array:
    """[n_samples]: the number of each sample's row at a position of its sequence.

    wanted: [n_samples], the positions. name: what they were called, for messages. Raises StoreError for a row that was not stored.
    """
    rows = stored_at(contents, samples, wanted)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        first, kept = missing[0], contents.settings.get("positions")
        raise StoreError(
            f"{path}: position {wanted[first]} ({name}) of sample {samples[first]} was not stored"
            f"{f': the run kept positions={kept!r}' if kept else ''}."
        )
    return rows


def stored_at(contents: Contents, samples: Array, wanted: Array) -> Array:
    """[n_samples]: the number of each sample's row at a position of its sequence, -1 where none was stored. The positions are read in one pass, some at a time.

    wanted: [n_samples], the positions.
    """
    segments = contents.segments.take(samples)
    ranges = segments.values[:]
    ends = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])])[segments.offset]  # of the samples, in rows
    rows = np.full(len(samples), -1, dtype=np.int64)
    start = 0
    while start < len(samples):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + _SLAB_ROWS, "right")) - 1)
        numbers = indices_of(ranges[segments.offset[start] : segments.offset[stop]])
        owners = np.repeat(np.arange(start, stop), np.diff(ends[start : stop + 1]))
        distinct, inverse = np.unique(numbers, return_inverse=True)  # samples share rows
        found = contents.positions[distinct][inverse] == wanted[owners]
        rows[owners[found]] = numbers[found]
        start = stop
    return rows

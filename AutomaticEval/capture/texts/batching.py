"""Texts as pieces, and pieces as batches of rows. Knows nothing of what is read of a forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.sources import Text
from AutomaticEval.errors import EmptyPrompt, PromptTooLong

ROW_TOKENS = 2048
"""The most tokens of a row that several pieces share: the mask of a row is as wide as it is high."""
TEXTS_TOGETHER = 2048
"""Texts that are encoded and sorted by length together, at most."""


class Piece(NamedTuple):
    """What is fed of one text at once."""

    doc_id: int
    window: int
    ids: list[int]
    text: str
    n_truncated: int

    @property
    def key(self) -> tuple[int, int]:
        return self.doc_id, self.window


class Place(NamedTuple):
    """Where pieces of the same tokens are in a batch: they are fed once."""

    pieces: list[Piece]
    row: int
    column: int


@dataclass
class TextPieces:
    """Cuts texts into pieces, and counts what it cut."""

    tokenizer: Any
    feeding: Feeding
    longest: int
    """Tokens that the model can be fed."""
    n_texts: int = 0
    n_truncated: int = 0
    """Texts that were cut."""
    n_tokens_cut: int = 0
    lengths: list[int] = field(default_factory=list)
    """The lengths of the texts in tokens, before any was cut; of the first million texts."""

    def windows(self, texts: Iterable[tuple[int, Text]]) -> Iterator[list[Piece]]:
        """Pieces of so many texts at a time as are sorted together. texts: with the number of each."""
        items = iter(texts)
        while some := list(islice(items, TEXTS_TOGETHER)):
            encoded = self.tokenizer([text for _, (text, _) in some], verbose=False)["input_ids"]
            yield [
                piece
                for (number, text), ids in zip(some, encoded, strict=True)
                for piece in self._cut(number, text, ids)
            ]

    def _cut(self, number: int, text: Text, ids: list[int]) -> Iterator[Piece]:
        if not ids:
            raise EmptyPrompt(f"{text.place}: the tokenizer gives no token for {text.text[:40]!r}.")
        self.n_texts += 1
        if len(self.lengths) < 1_000_000:
            self.lengths.append(len(ids))
        if len(ids) <= self.longest:
            yield Piece(number, 0, ids, text.text, 0)
            return
        if self.feeding.strict:
            raise PromptTooLong(
                f"{text.place}: {len(ids)} tokens, and {self.longest} can be fed; leave --strict out to cut it, or name a longer seq_length."
            )
        if not self.feeding.packing:
            self.n_truncated += 1
            self.n_tokens_cut += len(ids) - self.longest
            yield self._piece(number, 0, ids[: self.longest], len(ids) - self.longest)
            return
        for window, start in enumerate(range(0, len(ids), self.longest)):
            yield self._piece(number, window, ids[start : start + self.longest], 0)

    def _piece(self, number: int, window: int, ids: list[int], n_truncated: int) -> Piece:
        return Piece(number, window, ids, self.tokenizer.decode(ids, skip_special_tokens=True), n_truncated)


def batches_of(
    pieces: Sequence[Piece], feeding: Feeding, longest: int, n_tokens: int, limit: int | None = None
) -> Iterator[list[Place]]:
    """Batches of at most n_tokens columns in all (one row at least), or of feeding.batch_size rows, short pieces first.

    limit: tokens beyond which a row changes the shorter ones beside it; None when none does.
    """
    alike: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        alike.setdefault(tuple(piece.ids), []).append(piece)
    rows = _packed(list(alike.values()), longest) if feeding.packing else [[each] for each in alike.values()]
    rows.sort(key=_width)
    batch: list[Place] = []
    n_rows = 0
    for number, row in enumerate(rows):
        is_full = n_rows == feeding.batch_size if feeding.batch_size else (n_rows + 1) * _width(row) > n_tokens
        before = _width(rows[number - 1]) if number else 0
        is_other = limit is not None and before <= limit < _width(row)
        if n_rows and (is_full or is_other):
            yield batch
            batch, n_rows = [], 0
        column = 0
        for each in row:
            batch.append(Place(each, n_rows, column))
            column += len(each[0].ids)
        n_rows += 1
    if batch:
        yield batch


def _width(row: Sequence[Sequence[Piece]]) -> int:
    return sum(len(each[0].ids) for each in row)


def _packed(alike: list[list[Piece]], longest: int) -> list[list[list[Piece]]]:
    """Rows of at most so many tokens; the longest pieces first, each into the fullest row that it fits into."""
    longest = max(min(longest, ROW_TOKENS), *(len(each[0].ids) for each in alike), 1)
    by_room: dict[int, list[list[list[Piece]]]] = {}
    for each in sorted(alike, key=lambda each: -len(each[0].ids)):
        length = len(each[0].ids)
        room = min((room for room, rows in by_room.items() if room >= length and rows), default=None)
        row = by_room[room].pop() if room is not None else []
        row.append(each)
        by_room.setdefault((longest if room is None else room) - length, []).append(row)
    return [row for rows in by_room.values() for row in rows]


def shared_rows(places: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
    """A batch whose rows hold several pieces: token ids and positions [batch, columns], and who attends to whom [batch, 1, columns, columns].

    Each token sees itself and what is before it in its own piece; padding sees itself.
    """
    n_rows = max(place.row for place in places) + 1
    width = max(place.column + len(place.pieces[0].ids) for place in places)
    ids, positions = (torch.zeros(n_rows, width, dtype=torch.long) for _ in range(2))
    attended = torch.eye(width, dtype=torch.bool).repeat(n_rows, 1, 1)
    for place in places:
        own = place.pieces[0].ids
        columns = slice(place.column, place.column + len(own))
        ids[place.row, columns] = torch.tensor(own)
        positions[place.row, columns] = torch.arange(len(own))
        attended[place.row, columns, columns] = torch.ones(len(own), len(own), dtype=torch.bool).tril()
    return ids, positions, attended[:, None]

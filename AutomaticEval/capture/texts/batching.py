"""Texts -> pieces that a model can be fed, and pieces -> batches of rows. Does not know what is read of a forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.forward import PackedBatch
from AutomaticEval.capture.texts.sources import Text
from AutomaticEval.errors import EmptyPrompt, PromptTooLong

ROW_TOKENS = 2048
"""The most tokens of a row that several pieces share. The size of the mask of a row is the square of that."""
TEXTS_TOGETHER = 2048
"""The most texts that are encoded, and sorted by length, together."""


class Piece(NamedTuple):
    """The part of one text that is fed at once: the whole text, or a window of it."""

    doc_id: int
    window: int
    ids: list[int]
    text: str
    n_truncated: int

    @property
    def key(self) -> tuple[int, int]:
        """(doc_id, window), which no other piece of the run has."""
        return self.doc_id, self.window


class Slot(NamedTuple):
    """Where one piece stands in a batch. Pieces with the same tokens share a slot: they are fed once."""

    pieces: list[Piece]
    row: int
    column: int


@dataclass
class TextPieces:
    """Cuts texts into pieces, and counts what it cut."""

    tokenizer: Any
    feeding: Feeding
    longest: int
    """The most tokens of a piece."""
    n_texts: int = 0
    n_truncated: int = 0
    """How many texts were cut."""
    n_tokens_cut: int = 0
    lengths: list[int] = field(default_factory=list)
    """The lengths of the first million texts in tokens, before any was cut."""

    def windows(self, texts: Iterable[tuple[int, Text]]) -> Iterator[list[Piece]]:
        """The pieces of the texts, in lists of those that are sorted by length together. texts: (number, text)."""
        items = iter(texts)
        while together := list(islice(items, TEXTS_TOGETHER)):
            encoded = self.tokenizer([text for _, (text, _) in together], verbose=False)["input_ids"]
            yield [
                piece
                for (number, text), ids in zip(together, encoded, strict=True)
                for piece in self._cut(number, text, ids)
            ]

    def _cut(self, number: int, text: Text, ids: list[int]) -> Iterator[Piece]:
        """The pieces of one text. Raises EmptyPrompt, and with `strict` PromptTooLong."""
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
) -> Iterator[list[Slot]]:
    """Batches of pieces, short ones first: of at most n_tokens tokens with padding (one row at least), or of feeding.batch_size rows.

    longest: the most tokens of a row. limit: the length from which on a row changes shorter rows beside it; None when no row does.
    """
    alike: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        alike.setdefault(tuple(piece.ids), []).append(piece)
    rows = _packed(list(alike.values()), longest) if feeding.packing else [[each] for each in alike.values()]
    rows.sort(key=_width)
    batch: list[Slot] = []
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
            batch.append(Slot(each, n_rows, column))
            column += len(each[0].ids)
        n_rows += 1
    if batch:
        yield batch


def _width(row: Sequence[Sequence[Piece]]) -> int:
    return sum(len(each[0].ids) for each in row)


def _packed(alike: list[list[Piece]], longest: int) -> list[list[list[Piece]]]:
    """Rows of at most `longest` tokens: the longest pieces first, each put into the fullest row that still has room for it."""
    longest = max(min(longest, ROW_TOKENS), *(len(each[0].ids) for each in alike), 1)
    by_room: dict[int, list[list[list[Piece]]]] = {}
    for each in sorted(alike, key=lambda each: -len(each[0].ids)):
        length = len(each[0].ids)
        room = min((room for room, rows in by_room.items() if room >= length and rows), default=None)
        row = by_room[room].pop() if room is not None else []
        row.append(each)
        by_room.setdefault((longest if room is None else room) - length, []).append(row)
    return [row for rows in by_room.values() for row in rows]


def shared_rows(slots: Sequence[Slot]) -> PackedBatch:
    """A batch whose rows hold several pieces. Each token attends to itself and to earlier tokens of its own piece; padding attends to itself."""
    n_rows = max(slot.row for slot in slots) + 1
    width = max(slot.column + len(slot.pieces[0].ids) for slot in slots)
    ids, positions = (torch.zeros(n_rows, width, dtype=torch.long) for _ in range(2))
    attended = torch.eye(width, dtype=torch.bool).repeat(n_rows, 1, 1)
    for slot in slots:
        own = slot.pieces[0].ids
        columns = slice(slot.column, slot.column + len(own))
        ids[slot.row, columns] = torch.tensor(own)
        positions[slot.row, columns] = torch.arange(len(own))
        attended[slot.row, columns, columns] = torch.ones(len(own), len(own), dtype=torch.bool).tril()
    return PackedBatch(ids, positions, attended[:, None])

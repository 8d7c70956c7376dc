"""Which rows and columns of a forward are the tokens of a prompt or of a response, for edits that are made at some of them.

A forward with nothing in its cache begins the sequences of a batch: what it feeds is their prompts, without padding. Each later forward feeds one
token of every response. Where a forward feeds prompts together with responses, whoever runs it tells which tokens are which (`told`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import EditError
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.recording import Kept
from AutomaticEval.selection import Positions

_MOST = 2**40
"""More tokens than a response has."""


class BatchSequence(NamedTuple):
    """One sequence of a batch, in the forward that begins it."""

    begin: int
    """The column of its first token."""
    n_prompt: int
    n_response: int = 0
    """The tokens of a response that is there already; the last one is not fed."""


_told: weakref.WeakKeyDictionary[nn.Module, Sequence[BatchSequence]] = weakref.WeakKeyDictionary()
_without_padding: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""The models whose `generate` was given a mask of ones."""


@contextmanager
def told(model: nn.Module, rows: Sequence[BatchSequence]) -> Iterator[None]:
    """Inside, forwards of a model feed these sequences, one a row of the batch."""
    _told[inner(model)] = rows
    try:
        yield
    finally:
        _told.pop(inner(model), None)


@contextmanager
def given_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside, `generate` of a model is given this mask. transformers drops one without padding, so that forwards have none: then all is tokens."""
    if bool(mask.ne(0).all()):
        _without_padding[inner(model)] = True
    try:
        yield
    finally:
        _without_padding.pop(inner(model), None)


def positions_of(given: str | slice | Positions) -> Positions:
    """The positions of an edit. A slice without a part is one of the prompt, and `last` is the prompt's last token.

    Raises UnknownPositions; EditError for positions that are counted from the end of a response, which is not known while it is generated.
    """
    chosen = Positions.parse(given)
    bounds = (chosen.start, chosen.stop, chosen.step)
    if chosen.part == "all" and bounds != (None, None, None):
        return Positions("prompt", *bounds)
    if chosen.needs_thinking:
        raise EditError(
            f"positions={chosen} are not known before the response is: where its thinking ends is told by tokens that come later. Edit the response, "
            "or give `where`."
        )
    if chosen.part in ("response", "scored") and any(bound is not None and bound < 0 for bound in bounds):
        raise EditError(
            f"positions={chosen} count from the end of the response, which is not known while it is generated; count from its beginning: "
            f"{chosen.part}[:8]."
        )
    return chosen


class Sequences:
    """The sequences of a batch, followed from the forward that begins them through those that go on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rows: Sequence[BatchSequence] = ()
        self._begun: Tensor | None = None
        """The ids that the forward fed which began the sequences; None once a forward fed several more."""
        self._n_fed = 0
        """How many columns were fed since, its own among them."""
        self._n_columns: int | None = None
        """The columns of the forward that began the sequences. None: no forward was seen that began any."""

    def begin(self, ids: Tensor, mask: Any) -> None:
        """A forward begins sequences. ids: [rows, columns], which are fed. mask: the attention mask that the model was given, or None.

        Raises EditError for a mask that does not say which columns are padding, for sequences that are not those that were told, and for
        sequences that go on with those of the forward before, because their responses would be taken for prompts.
        """
        shape = (ids.shape[0], ids.shape[1])
        rows = _told.get(self._model)
        if rows is None:
            self._refuse_again(ids)
        self._begun, self._n_fed = ids, ids.shape[1]
        if rows is not None and len(rows) != shape[0]:
            raise EditError(f"a forward has {shape[0]} rows, and {len(rows)} sequences were told; nothing was edited.")
        self._rows = _masked(shape, mask, self._model in _without_padding) if rows is None else rows
        self._n_columns = shape[1]

    def go_on(self, n_columns: int) -> None:
        """A forward feeds more columns of the sequences."""
        self._n_fed += n_columns
        if n_columns != 1:
            self._begun = None

    def _refuse_again(self, ids: Tensor) -> None:
        before = self._begun
        is_one_more = before is not None and ids.shape[1] == self._n_fed + 1 and len(ids) == len(before)
        if before is not None and is_one_more and torch.equal(before.to(ids.device), ids[:, : before.shape[1]]):
            raise EditError(
                "a forward feeds the tokens of those before again, and one more: where the prompt ends is not known to an edit with positions. "
                "Generate with keys and values (use_cache=True), or give `where` in place of positions."
            )

    def at(self, positions: Positions, first: int, n_columns: int) -> Kept:
        """The (row, column) pairs of a forward that are at the positions. Raises EditError when that is not known."""
        if first == 0:
            places = [
                (number, row.begin + position)
                for number, row in enumerate(self._rows)
                for position in positions.resolve(row.n_prompt, row.n_response)
            ]
        elif self._n_columns is None or n_columns != 1:
            raise EditError(
                f"positions={positions} need a prompt that is fed in one forward, and a response that is fed token by token; a forward goes on with "
                f"{n_columns} tokens after {first}. Leave positions out, or leave out what feeds the prompt in parts."
            )
        else:
            is_at = _is_at(positions, first - self._n_columns)
            places = [(number, first) for number in range(len(self._rows))] if is_at else []
        pairs = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
        return Kept(pairs[:, 0], pairs[:, 1])


def _is_at(positions: Positions, number: int) -> bool:
    """Whether a token of a response, by its number in it, is at the positions."""
    if positions.part == "prompt":
        return False
    before = 1 if positions.part == "scored" else 0  # scored begins with the prompt's last token
    return number + before in range(_MOST)[positions.start : positions.stop : positions.step]


def _masked(shape: tuple[int, int], mask: Any, is_without_padding: bool) -> list[BatchSequence]:
    """The sequences of a forward that feeds prompts alone, by its attention mask."""
    n_rows, n_columns = shape
    if mask is None:
        if n_rows > 1 and not is_without_padding:
            raise EditError(
                f"a forward has {n_rows} rows and no attention mask, so that an edit at positions would take padding for tokens; pass attention_mask. "
                "(transformers' generate drops a mask without padding: generate one row at a time there, or with generate_inference.)"
            )
        return [BatchSequence(0, n_columns)] * n_rows
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise EditError(
            f"the attention mask is {found}; an edit at positions needs one of {shape}, which says which columns are padding."
        )
    rows = []
    for own in mask.ne(0).tolist():
        columns = [column for column, is_there in enumerate(own) if is_there]
        begin, end = (columns[0], columns[-1] + 1) if columns else (0, 0)
        rows.append(BatchSequence(begin, end - begin))
    return rows

"""What to keep of the forwards of a batch, and the kept rows of each of its sequences.

Does not know where the sequences come from, nor what is done with their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.reduced_rows import taps_of
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import CaptureError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.recording import Keep, Kept, Recording, capturing
from AutomaticEval.samples import Part, Rows
from AutomaticEval.selection import Positions, Selection


class BatchRow(NamedTuple):
    """Where one sequence stands in a batch."""

    row: int
    pad: int = 0
    """The columns of padding before it."""

    n_past: int = 0
    """How many of its tokens were computed before this batch. They are not fed, and have no rows here."""


def dtype_of(selection: Selection) -> torch.dtype | None:
    """The dtype to which rows are narrowed when they are copied out of the model; None leaves them as they are."""
    return None if selection.copied_as is None else getattr(torch, selection.copied_as)


def recording_of(
    loaded: LoadedModel, selection: Selection | None, keep: Keep | None, n_rows: int, **how: Any
) -> AbstractContextManager[Any]:
    """`capturing` of the selected sites. Without a selection nothing is hooked, and the recording is None. how: `waits`, `n_columns`."""
    if selection is None or keep is None:
        return nullcontext()
    layout = loaded.layout
    taps = taps_of(layout, selection)
    return capturing(loaded.model, taps, layout.embedding, keep, n_rows, dtype_of(selection), **how)


def keep_of(positions: Positions, prompts: Sequence[Sequence[int]], pads: Sequence[int], n_past: int = 0) -> Keep:
    """What to keep of each forward of a left-padded batch that generates: no padding, and every position that may turn out to be selected.

    n_past: how many tokens of each prompt were computed before this batch and are not fed.
    """
    windows = [positions.window(len(prompt)) for prompt in prompts]
    begins = [pad - n_past for pad in pads]
    low = torch.tensor([begin + first for begin, (first, _) in zip(begins, windows, strict=True)])
    high = torch.tensor(
        [2**62 if last is None else begin + last for begin, (_, last) in zip(begins, windows, strict=True)]
    )
    low = torch.maximum(low, torch.tensor(list(pads)))
    return _keep_where(lambda columns: (columns >= low[:, None]) & (columns < high[:, None]))


def keep_columns(columns: Sequence[Sequence[int]]) -> Keep:
    """Keep these columns of each row of a batch, whichever forward feeds them."""
    width = 1 + max((column for each in columns for column in each), default=-1)
    mask = torch.zeros(len(columns), width, dtype=torch.bool)
    for row, own in enumerate(columns):
        mask[row, list(own)] = True
    return _keep_where(lambda fed: mask[:, fed[fed < width]])


def _keep_where(is_kept: Callable[[Tensor], Tensor]) -> Keep:
    """Keep the pairs of row and column that `is_kept` names: it takes the columns of a forward [n], and gives [n_rows, n] or fewer columns."""

    def keep(first: int, n_columns: int) -> Kept:
        rows, numbers = is_kept(torch.arange(first, first + n_columns)).nonzero(as_tuple=True)
        return Kept(rows, numbers + first)

    return keep


def sequence_rows(
    recording: Recording, at: BatchRow, sequence: Sequence[int], positions: Sequence[int], tokenizer: Any
) -> list[Rows]:
    """The kept rows of one sequence of a batch, after a check that the model was fed that very sequence.

    They come in the pieces in which they arrived, at least one, which follow each other and are not copied.
    sequence: the tokens of prompt and response, of which the last is never fed. positions: those whose rows are wanted, ascending.
    Raises CaptureError.
    """
    own = list(sequence[at.n_past : -1])
    fed = recording.fed(at.row)[at.pad : at.pad + len(own)]
    if fed != own:
        raise CaptureError(
            f"batch row {at.row}: the model was fed {len(fed)} tokens that are not the {len(own)} of its sequence "
            "(beam search and assisted decoding cannot be captured). Nothing was stored."
        )
    pieces = []
    n_before = 0
    for activations in recording.runs(at.row, [at.pad + position - at.n_past for position in positions]):
        here = list(positions[n_before : n_before + len(next(iter(activations.values()), ()))])
        token_ids = [sequence[position] for position in here]
        pieces.append(Rows(token_ids, token_strings(tokenizer, token_ids), here, activations))
        n_before += len(here)
    return pieces


def parts_of(pieces: Sequence[Rows], positions: Container[int]) -> list[Part]:
    """The rows of some positions, in pieces of one sequence. A piece without any is left out, unless no piece has one."""
    parts = [Part(rows, [n for n, each in enumerate(rows.positions) if each in positions]) for rows in pieces]
    return [part for part in parts if part.where] or parts[:1]


def sample_columns(prompt: str, response: str, n_prompt_tokens: int, batch: Sequence[int]) -> dict[str, Any]:
    """The columns that every sample has. batch: the numbers of rows and columns of the batch in which it was computed."""
    return {
        "prompt": prompt,
        "response": response,
        "timestamp": datetime.now().astimezone().isoformat(),
        "n_prompt_tokens": n_prompt_tokens,
        "batch_rows": batch[0],
        "batch_columns": batch[1],
    }

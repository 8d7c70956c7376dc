"""Pieces of texts -> their samples: forwards over batches of pieces, each read as far as the selection needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.batch_independence import rope_limit
from AutomaticEval.capture.keeping import dtype_of, sample_columns
from AutomaticEval.capture.memory import unless_too_large
from AutomaticEval.capture.reduced_rows import bytes_per_row, taps_of
from AutomaticEval.capture.reduced_samples import SampleReducer
from AutomaticEval.capture.texts.batching import ROW_TOKENS, Piece, Slot, batches_of, shared_rows
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.forward import padded, recorded
from AutomaticEval.capture.tree.suitability import why_not_masked
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import CaptureError, PromptError, SelectionError, TreeUnsuitable
from AutomaticEval.models.attention import reading_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.plain_module import is_plain, refuse_plain
from AutomaticEval.models.divided.division import refuse_divided
from AutomaticEval.models.layout import Tap
from AutomaticEval.models.recording import Kept, Recording
from AutomaticEval.models.refused.unsuited import refuse_unready
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site, expand

TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens a forward, by kind of device. They are halved when a forward does not fit into memory."""
PACKED_ROW_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a row of a packed text may be from that of the same text alone, as a part of its largest number."""


class _BatchShape(NamedTuple):
    """What all samples of one batch say of it."""

    rows: int
    columns: int
    timestamp: str


class PieceForwards:
    """The forwards of one extraction: pieces in, their samples out.

    Raises PromptError when seq_length is longer than the model's context; TreeUnsuitable when texts are to share rows and the model cannot
    be masked; UnsupportedModel, SiteUnavailable.
    """

    def __init__(self, loaded: LoadedModel, selection: Selection, feeding: Feeding) -> None:
        refuse_unready(loaded.model)
        refuse_divided(loaded.model, "an extraction of texts")
        if is_plain(loaded.model):
            if feeding.packing or feeding.patterns:
                refuse_plain(loaded.model, "packing and pattern need attention of transformers")
            feeding = replace(feeding, batch_size=1)
        self._loaded, self._feeding, self._selection = loaded, feeding, selection
        self._layout, self._dtype = loaded.layout, dtype_of(selection)
        self._taps, self._reduced = taps_of(self._layout, selection), SampleReducer(selection)
        if feeding.patterns and selection.reduction is not None:
            raise SelectionError(
                f"patterns are not reduced ({selection.reduction.name} was asked for): their rows have no width of their own. Leave pattern out."
            )
        self._patterns = self._pattern_layers(selection) if feeding.patterns else []
        context = loaded.context
        self.longest = min(each for each in (feeding.seq_length, context, 2**62) if each is not None)
        """The most tokens of a piece."""
        if context is not None and feeding.seq_length is not None and feeding.seq_length > context:
            raise PromptError(f"seq_length is {feeding.seq_length}; {loaded.name} can be fed {context} tokens.")
        if feeding.packing:
            reason = why_not_masked(loaded.model, self.longest)
            if reason is not None:
                raise TreeUnsuitable(f"texts cannot share rows of {loaded.name}: {reason} Leave packing out.")
        self._n_tokens = max(
            TOKENS.get(loaded.model.device.type, TOKENS["cuda"]),
            min(self.longest, ROW_TOKENS) if feeding.packing else 0,
        )
        self._is_checked = not feeding.packing

    def _pattern_layers(self, selection: Selection) -> list[int]:
        """The layers whose attention patterns are kept. Raises SiteUnavailable for a layer without attention."""
        asked = expand(["z"], selection.layers_text(), self._layout.n_layers)
        sites = self._layout.where_held(asked) if selection.layers is None else asked
        self._layout.pick(sites)
        return [site.layer for site in sites if site.layer is not None]

    @property
    def bytes_per_token(self) -> int:
        """The size of one token's rows on the disk, or of one sample's line. Patterns count with n_heads numbers for each token of the longest piece."""
        dtype = self._dtype or self._loaded.model.dtype
        patterns = len(self._patterns) * self._layout.n_heads * self.longest
        return bytes_per_row(self._loaded, self._selection) + patterns * dtype.itemsize

    def over(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, list[Sample]]]:
        """For each batch: the number of tokens that were fed, and its samples. A batch that does not fit into memory is halved."""
        limit = rope_limit(self._loaded.model)
        waiting = list(batches_of(pieces, self._feeding, self.longest, self._n_tokens, limit))[::-1]
        while waiting:
            slots = waiting.pop()
            n_rows = len({slot.row for slot in slots})
            samples = unless_too_large(partial(self._samples, slots), can_be_smaller=n_rows > 1)
            if samples is None:
                waiting += _halves(slots)[::-1]
                self._n_tokens = max(1, self._n_tokens // 2)
                continue
            if not self._is_checked:
                self._check(slots, samples)
            yield sum(len(slot.pieces[0].ids) for slot in slots), self._reduced(samples)

    def _samples(self, slots: Sequence[Slot]) -> list[Sample]:
        """The samples of one batch."""
        positions = [self._selection.positions.resolve(len(slot.pieces[0].ids), 0) for slot in slots]
        pairs = [(slot.row, slot.column + p) for slot, own in zip(slots, positions, strict=True) for p in own]
        kept = Kept(*torch.tensor(pairs, dtype=torch.long).reshape(len(pairs), 2).unbind(1))
        recording, patterns = self._forward(slots, kept)
        n_rows, n_columns = recording.fed_ids().shape
        shape = _BatchShape(n_rows, n_columns, datetime.now().astimezone().isoformat())
        samples: list[Sample] = []
        first = 0
        for slot, own in zip(slots, positions, strict=True):
            activations = {key: recording.rows[key][first : first + len(own)] for key in self._taps}
            for layer, pattern in patterns.items():
                rows = pattern_rows(pattern[slot.row], slot.column, own, len(slot.pieces[0].ids), self.longest)
                activations[Site("pattern", layer).key] = rows
            first += len(own)
            samples += self._samples_of(slot, own, activations, shape)
        return samples

    def _samples_of(
        self, slot: Slot, positions: range, activations: Mapping[str, Tensor], shape: _BatchShape
    ) -> list[Sample]:
        """A sample for each piece of a slot, all of which share its rows."""
        ids = slot.pieces[0].ids
        token_ids = [ids[position] for position in positions]
        rows = Rows(token_ids, token_strings(self._loaded.tokenizer, token_ids), list(positions), activations)
        part = Part(rows, range(len(positions)))
        samples = []
        for piece in slot.pieces:
            columns = sample_columns(piece.text, "", len(ids), (shape.rows, shape.columns))
            of_piece = {"doc_id": piece.doc_id, "window": piece.window, "n_truncated": piece.n_truncated}
            samples.append(Sample({**columns, "timestamp": shape.timestamp, **of_piece}, ids, [], [part]))
        return samples

    def _forward(self, slots: Sequence[Slot], kept: Kept) -> tuple[Recording, dict[int, Tensor]]:
        """What was read, and of the layers whose patterns are kept: layer -> [batch, n_heads, query_pos, key_pos]."""
        if not self._patterns:
            return self._recorded(slots, kept, self._taps), {}
        with reading_patterns(self._loaded.model, self._layout, self._patterns) as patterns:
            recording = self._recorded(slots, kept, {**self._taps, "after": patterns.after})
            mask = torch.zeros(recording.fed_ids().shape, dtype=torch.bool)
            for slot in slots:
                mask[slot.row, slot.column : slot.column + len(slot.pieces[0].ids)] = True
            return recording, {layer: patterns.of(layer, mask).to("cpu", self._dtype) for layer in self._patterns}

    def _recorded(self, slots: Sequence[Slot], kept: Kept, taps: Mapping[str, Tap]) -> Recording:
        """One forward over a batch. Raises CaptureError when the model was fed other tokens than the pieces'."""
        batch: Any = shared_rows(slots) if self._feeding.packing else padded([slot.pieces[0].ids for slot in slots])
        recording = recorded(self._loaded.model, self._layout, taps, batch, kept, self._dtype)
        if recording.fed_ids().tolist() != batch.ids.tolist():
            raise CaptureError("the model was fed other tokens than the texts'. Nothing was stored.")
        return recording

    def _check(self, slots: Sequence[Slot], samples: Sequence[Sample]) -> None:
        """Compare the rows of one piece that shares a row with those of a forward of it alone. Raises TreeUnsuitable."""
        shared = [slot for slot in slots if slot.column]
        if not shared:
            return
        self._is_checked = True
        piece = shared[-1].pieces[0]
        sample = next(each for each in samples if (each.fields["doc_id"], each.fields["window"]) == piece.key)
        rows = sample.parts[0].rows
        columns = torch.tensor(rows.positions, dtype=torch.long)
        kept = Kept(torch.zeros_like(columns), columns)
        alone = recorded(self._loaded.model, self._layout, self._taps, padded([piece.ids]), kept, self._dtype).rows
        tolerance = PACKED_ROW_TOLERANCES.get(self._loaded.model.dtype, 0.1)
        for key in self._taps:
            difference = (rows.activations[key] - alone[key]).float().abs().max().item()
            size = alone[key].float().abs().max().item()
            if not difference <= tolerance * (size + 1e-3):  # also when it is NaN
                raise TreeUnsuitable(
                    f"{key} of a text that shares a row is {difference:.2g} from the same text alone: {self._loaded.name} lets texts see one "
                    "another. Leave packing out."
                )


def pattern_rows(pattern: Tensor, column: int, positions: range, n_ids: int, n_keys: int) -> Tensor:
    """What some positions of one piece attend to: [n_positions, n_heads * n_keys], with zeros beyond the tokens of the piece.

    pattern: [n_heads, query_pos, key_pos] of the row. column: where the piece begins.
    """
    own = pattern[:, column : column + n_ids, column : column + n_ids][:, list(positions)]
    wide = torch.nn.functional.pad(own, (0, n_keys - n_ids))  # [n_heads, n_positions, n_keys]
    return wide.transpose(0, 1).flatten(1)


def _halves(slots: Sequence[Slot]) -> list[list[Slot]]:
    """A batch as two batches of whole rows."""
    middle = (max(slot.row for slot in slots) + 1) // 2
    first = [slot for slot in slots if slot.row < middle]
    second = [slot._replace(row=slot.row - middle) for slot in slots if slot.row >= middle]
    return [first, second]

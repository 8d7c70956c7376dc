"""Texts -> a run folder with their activations: each token fed once, nothing generated, nothing computed above what is kept."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.capture.batch_independence import rope_limit
from AutomaticEval.capture.keeping import bytes_per_row, dtype_of, sample_columns
from AutomaticEval.capture.memory import unless_too_large
from AutomaticEval.capture.texts.batching import ROW_TOKENS, Feeding, Piece, Place, TextPieces, batches_of, shared_rows
from AutomaticEval.capture.texts.forward import Batch, inputs, padded, recorded
from AutomaticEval.capture.texts.sources import Text
from AutomaticEval.capture.tree.suitability import why_not_masked
from AutomaticEval.capture.tree.walk import as_mask
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import CaptureError, OtherSettings, PromptError, SelectionError, TreeUnsuitable
from AutomaticEval.models.attention import reading_patterns
from AutomaticEval.models.find_layout import refuse_unready
from AutomaticEval.models.layout import Tap, input_device
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.models.recording import Kept, Recording
from AutomaticEval.processes import Ranks
from AutomaticEval.safe_text import shown
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site, expand
from AutomaticEval.store.contents.columns import Columns, Ordered
from AutomaticEval.store.shared import SharedRun
from AutomaticEval.store.writer import SHARD_BYTES, RunWriter

TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens a forward, by kind of device; halved when they do not fit into memory."""
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a packed row may be from the same text alone, as a part of its largest number."""


@dataclass
class Extracted:
    """What an extraction gave."""

    folder: Path
    n_texts: int = 0
    n_samples: int = 0
    n_tokens: int = 0
    """That were fed in this run: not those that were on the disk already, and equal texts of a window once."""
    n_truncated: int = 0
    n_tokens_cut: int = 0
    seconds: float = 0.0
    size_bytes: int = 0
    lengths: list[int] = field(default_factory=list, repr=False)
    """The lengths of the texts in tokens, before any was cut."""


def extract(
    loaded: LoadedModel,
    texts: Iterable[str | Text],
    selection: Selection,
    folder: Path,
    *,
    feeding: Feeding = Feeding(),
    name: str = "texts",
    about: Mapping[str, Any] | None = None,
    compression: str | None = None,
    ranks: Ranks = Ranks(),
    resume: bool = False,
    total: int | None = None,
) -> Extracted:
    """Capture texts into a run folder, sample by sample: column `task` is the name, `doc_id` the text's number, `window` the piece's.

    about: what the texts are, for the settings, so that other texts are not taken for them when the run goes on. resume: go on in the
    folder. total: how many texts there are, for the progress.
    Raises PromptError for texts that cannot be fed, SelectionError, SiteUnavailable, StoreError.
    """
    refuse_response(selection)
    forwards = Forwards(loaded, selection, feeding)
    settings = {**loaded.made_with(), **selection.as_dict(), "corpus": {"name": name, **(about or {})}}
    settings["corpus"] |= {"seq_length": forwards.longest, "packing": feeding.packing}
    shared = SharedRun(loaded.name, settings, SHARD_BYTES, compression, feeding.strict, ranks, loaded.paths)
    done = Extracted(folder)
    started = time.perf_counter()
    pieces = TextPieces(loaded.tokenizer, feeding, forwards.longest)
    mine = ((number, as_text(text)) for number, text in enumerate(texts) if number % ranks.n_ranks == ranks.rank)
    with shared.writing(lambda: folder, resume=resume, tell=_keys) as (writer, _, there):
        bar = tqdm(
            total=total and -(-total // ranks.n_ranks), desc=shown(name), unit="text", disable=not ranks.is_first
        )
        with bar:
            for window in pieces.windows(mine):
                for batch, samples in forwards.over(_missing(window, there)):
                    writer.add(_named(samples, name))
                    done.n_tokens += batch
                bar.update(len({piece.doc_id for piece in window}))
    done.seconds = time.perf_counter() - started
    _add_up(done, pieces, ranks)
    if not done.n_texts:
        raise PromptError(f"{name}: there were no texts.")
    finished = shared.finish(folder, _sorted)
    done.n_samples, done.size_bytes = finished or (0, 0)
    return done


def refuse_response(selection: Selection) -> None:
    """Raises SelectionError for positions that texts without a response have not."""
    if selection.positions.part in ("response", "scored"):
        raise SelectionError(
            f"texts have no response, so that there are no {selection.positions}; keep all, last, or a slice."
        )


def as_text(text: str | Text) -> Text:
    if isinstance(text, Text):
        return text
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{'an empty text' if isinstance(text, str) else type(text).__name__} among the texts.")
    return Text(text, "a text")


def _keys(writer: RunWriter) -> dict[tuple[int, int], int]:
    """(doc_id, window) of what is on the disk -> a hash of its text."""
    if not writer.n_samples:
        return {}
    columns = writer.table()
    keys = zip(columns.whole("doc_id"), columns.whole("window"), strict=True)
    return {key: _hash(prompt) for key, prompt in zip(keys, columns.whole("prompt"), strict=True)}


def _sorted(columns: Columns) -> Columns:
    """By text and piece."""
    return Ordered(columns, np.lexsort([columns.whole("window"), columns.whole("doc_id")]))


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def _missing(window: Sequence[Piece], there: Mapping[tuple[int, int], int]) -> list[Piece]:
    """The pieces that are not on the disk. Raises OtherSettings when another text is there in place of one."""
    for piece in window:
        if there.get(piece.key, _hash(piece.text)) != _hash(piece.text):
            raise OtherSettings(
                f"text {piece.doc_id} ({piece.text[:40]!r} …) is another than the one on the disk: the texts changed. Name another folder."
            )
    return [piece for piece in window if piece.key not in there]


def _named(samples: Sequence[Sample], name: str) -> list[Sample]:
    return [Sample({**each.fields, "task": name}, each.input_ids, each.generated_ids, each.parts) for each in samples]


def _add_up(done: Extracted, pieces: TextPieces, ranks: Ranks) -> None:
    """Over all processes."""
    own = (pieces.n_texts, done.n_tokens, pieces.n_truncated, pieces.n_tokens_cut, pieces.lengths)
    for n_texts, n_tokens, n_truncated, n_tokens_cut, lengths in ranks.gathered(own):
        done.n_texts += n_texts
        done.n_truncated += n_truncated
        done.n_tokens_cut += n_tokens_cut
        done.lengths += lengths
        done.n_tokens += n_tokens
    done.n_tokens -= own[1]


class Forwards:
    """The forwards of one extraction: pieces in, their samples out."""

    def __init__(self, loaded: LoadedModel, selection: Selection, feeding: Feeding) -> None:
        refuse_unready(loaded.model)
        self._loaded, self._feeding, self._selection = loaded, feeding, selection
        self._layout, self._dtype = loaded.layout, dtype_of(selection)
        self._taps = self._layout.pick(selection.sites(self._layout.n_layers))
        self._patterns = self._pattern_layers(selection) if feeding.patterns else []
        context = loaded.context
        self.longest = min(each for each in (feeding.seq_length, context, 2**62) if each is not None)
        """Tokens of the longest piece."""
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
        layers = [site.layer for site in expand(["resid_post"], selection.layers_text(), self._layout.n_layers)]
        found = [layer for layer in layers if layer is not None]
        self._layout.pick(Site("z", layer) for layer in found)
        return found

    @property
    def bytes_per_token(self) -> int:
        """On the disk, of all sites; patterns have n_heads numbers for each of the longest piece's tokens."""
        dtype = self._dtype or self._loaded.model.dtype
        patterns = len(self._patterns) * self._layout.n_heads * self.longest
        return bytes_per_row(self._loaded, self._selection) + patterns * dtype.itemsize

    def over(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, list[Sample]]]:
        """For each batch: (number of tokens that were fed, its samples)."""
        limit = rope_limit(self._loaded.model)
        waiting = list(batches_of(pieces, self._feeding, self.longest, self._n_tokens, limit))[::-1]
        while waiting:
            places = waiting.pop()
            n_rows = len({place.row for place in places})
            samples = unless_too_large(partial(self._samples, places), can_be_smaller=n_rows > 1)
            if samples is None:
                waiting += _halves(places)[::-1]
                self._n_tokens = max(1, self._n_tokens // 2)
                continue
            if not self._is_checked:
                self._check(places, samples)
            yield sum(len(place.pieces[0].ids) for place in places), samples

    def _samples(self, places: Sequence[Place]) -> list[Sample]:
        sequences = [place.pieces[0].ids for place in places]
        positions = [self._selection.positions.resolve(len(ids), 0) for ids in sequences]
        kept = Kept(
            torch.tensor(
                [place.row for place, own in zip(places, positions, strict=True) for _ in own], dtype=torch.long
            ),
            torch.tensor(
                [place.column + p for place, own in zip(places, positions, strict=True) for p in own], dtype=torch.long
            ),
        )
        recording, patterns = self._forward(places, sequences, kept)
        shape = tuple(recording.fed_ids().shape)
        samples: list[Sample] = []
        first = 0
        when = datetime.now().astimezone().isoformat()
        for place, own in zip(places, positions, strict=True):
            found = {key: recording.rows[key][first : first + len(own)] for key in self._taps}
            found |= {
                Site("pattern", layer).key: pattern_rows(
                    pattern[place.row], place.column, own, len(place.pieces[0].ids), self.longest
                )
                for layer, pattern in patterns.items()
            }
            first += len(own)
            samples += self._of_place(place, own, found, shape, when)
        return samples

    def _forward(
        self, places: Sequence[Place], sequences: Sequence[list[int]], kept: Kept
    ) -> tuple[Recording, dict[int, Tensor]]:
        """What was read, and of some layers the patterns [batch, n_heads, query_pos, key_pos]."""
        if not self._patterns:
            return self._recorded(places, sequences, kept, self._taps), {}
        with reading_patterns(self._loaded.model, self._layout, self._patterns) as patterns:
            taps = {**self._taps, "after": patterns.after}
            recording = self._recorded(places, sequences, kept, taps)
            mask = torch.zeros(recording.fed_ids().shape, dtype=torch.bool)
            for place, ids in zip(places, sequences, strict=True):
                mask[place.row, place.column : place.column + len(ids)] = True
            return recording, {layer: patterns.of(layer, mask).to("cpu", self._dtype) for layer in self._patterns}

    def _recorded(
        self, places: Sequence[Place], sequences: Sequence[list[int]], kept: Kept, taps: Mapping[str, Tap]
    ) -> Recording:
        """One forward, of which it is checked that it was fed the texts."""
        model = self._loaded.model
        if self._feeding.packing:
            ids, positions, attended = shared_rows(places)
            device = input_device(model)
            mask = as_mask(model, attended.to(device))  # as the model attends just now
            given: dict[str, Any] = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
            given |= {"attention_mask": mask, "use_cache": False}
        else:
            batch = padded(sequences)
            ids, given = batch.ids, inputs(model, batch)
        recording = recorded(model, self._layout, taps, Batch(ids, ids), kept, self._dtype, given)
        if recording.fed_ids().tolist() != ids.tolist():
            raise CaptureError("the model was fed other tokens than the texts'. Nothing was stored.")
        return recording

    def _of_place(
        self, place: Place, positions: range, found: Mapping[str, Tensor], shape: tuple[int, ...], when: str
    ) -> list[Sample]:
        ids = place.pieces[0].ids
        token_ids = [ids[position] for position in positions]
        rows = Rows(token_ids, token_strings(self._loaded.tokenizer, token_ids), list(positions), found)
        part = Part(rows, range(len(positions)))
        return [
            Sample(
                {
                    **sample_columns(piece.text, "", len(ids), shape),
                    "timestamp": when,
                    "doc_id": piece.doc_id,
                    "window": piece.window,
                    "n_truncated": piece.n_truncated,
                },
                ids,
                [],
                [part],
            )
            for piece in place.pieces
        ]

    def _check(self, places: Sequence[Place], samples: Sequence[Sample]) -> None:
        """Compare the last of the pieces that share a row with a forward of it alone. Raises TreeUnsuitable."""
        shared = [place for place in places if place.column]
        if not shared:
            return
        self._is_checked = True
        piece = shared[-1].pieces[0]
        sample = next(each for each in samples if (each.fields["doc_id"], each.fields["window"]) == piece.key)
        kept = torch.tensor(sample.parts[0].rows.positions, dtype=torch.long)
        batch = padded([piece.ids])
        alone = recorded(
            self._loaded.model, self._layout, self._taps, batch, Kept(torch.zeros_like(kept), kept), self._dtype
        ).rows
        for key in self._taps:
            found = sample.parts[0].rows.activations[key]
            off, size = (found - alone[key]).float().abs().max().item(), alone[key].float().abs().max().item()
            if not off <= TOLERANCES.get(self._loaded.model.dtype, 0.1) * (size + 1e-3):  # nan is off, too
                raise TreeUnsuitable(
                    f"{key} of a text that shares a row is {off:.2g} from the same text alone: {self._loaded.name} lets texts see one "
                    "another. Leave packing out."
                )


def pattern_rows(pattern: Tensor, column: int, positions: range, n_ids: int, n_keys: int) -> Tensor:
    """What some positions of one piece attend to: [n_positions, n_heads * n_keys], zeros beyond its tokens.

    pattern: [n_heads, query_pos, key_pos] of the row. column: where the piece begins.
    """
    own = pattern[:, column : column + n_ids, column : column + n_ids][:, list(positions)]
    wide = torch.nn.functional.pad(own, (0, n_keys - n_ids))  # [n_heads, n_positions, n_keys]
    return wide.transpose(0, 1).flatten(1)


def _halves(places: Sequence[Place]) -> list[list[Place]]:
    """A batch as two, of whole rows."""
    middle = (max(place.row for place in places) + 1) // 2
    low = [place for place in places if place.row < middle]
    high = [place._replace(row=place.row - middle) for place in places if place.row >= middle]
    return [low, high]

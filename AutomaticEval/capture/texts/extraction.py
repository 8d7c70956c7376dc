"""Texts -> a run folder with their activations: each token is fed once, nothing is generated, and nothing is computed above what is kept."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from AutomaticEval.capture.texts.batching import Piece, TextPieces
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.piece_forwards import PieceForwards
from AutomaticEval.capture.texts.sources import as_text
from AutomaticEval.capture.texts.text_set import TextSet
from AutomaticEval.errors import OtherSettings, PromptError, SelectionError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.processes import Ranks
from AutomaticEval.safe_text import shown
from AutomaticEval.samples import Sample
from AutomaticEval.selection import OF_THINKING, Selection
from AutomaticEval.store.contents.columns import Columns, Ordered
from AutomaticEval.store.shared import SharedRun
from AutomaticEval.store.writer import SHARD_BYTES, RunWriter


@dataclass(frozen=True)
class Writing:
    """How an extraction writes its run folder."""

    compression: str | None = None
    """Name of a compression that the store knows; None writes plain numbers."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that share the run; each one takes every n-th text."""
    resume: bool = False
    """Go on in a folder that an earlier extraction began."""


@dataclass
class Extracted:
    """What an extraction gave, over all processes."""

    folder: Path
    n_texts: int = 0
    n_samples: int = 0
    n_tokens: int = 0
    """Tokens that were fed by this call. Tokens that were on the disk already do not count, and equal texts that were encoded together count
    once."""
    n_truncated: int = 0
    """How many texts were cut."""
    n_tokens_cut: int = 0
    seconds: float = 0.0
    size_bytes: int = 0
    lengths: list[int] = field(default_factory=list, repr=False)
    """The lengths of the texts in tokens, before any was cut."""


def extract(
    loaded: LoadedModel,
    texts: TextSet,
    selection: Selection,
    folder: Path,
    feeding: Feeding = Feeding(),
    writing: Writing = Writing(),
) -> Extracted:
    """Capture texts into a run folder, a sample for each piece of a text.

    Of the columns, `task` is the name of the set, `doc_id` the number of the text, and `window` the number of the piece.
    Raises PromptError for texts that cannot be fed, OtherSettings for a folder that holds other texts, SelectionError, SiteUnavailable,
    StoreError.
    """
    refuse_response(selection)
    ranks = writing.ranks
    forwards = PieceForwards(loaded, selection, feeding)
    corpus = {"name": texts.name, **texts.about, "seq_length": forwards.longest, "packing": feeding.packing}
    settings = loaded.made_with().changed(**selection.as_dict(), corpus=corpus).as_dict()
    matrices = {**selection.matrices, **loaded.edit_values()}
    how = (SHARD_BYTES, writing.compression, feeding.strict, ranks, loaded.paths, matrices)
    shared = SharedRun(loaded.name, settings, *how)
    extracted = Extracted(folder)
    started = time.perf_counter()
    pieces = TextPieces(loaded.tokenizer, feeding, forwards.longest)
    own = ((number, as_text(text)) for number, text in enumerate(texts.texts) if number % ranks.n_ranks == ranks.rank)
    n_own = texts.total and -(-texts.total // ranks.n_ranks)
    with (
        shared.writing(lambda: folder, resume=writing.resume, tell=_stored_pieces) as (writer, _, stored),
        tqdm(total=n_own, desc=shown(texts.name), unit="text", disable=not ranks.is_first) as progress,
    ):
        for window in pieces.windows(own):
            for n_tokens, samples in forwards.over(_missing(window, stored)):
                writer.add(_named(samples, texts.name))
                extracted.n_tokens += n_tokens
            progress.update(len({piece.doc_id for piece in window}))
    extracted.seconds = time.perf_counter() - started
    _add_up(extracted, pieces, ranks)
    if not extracted.n_texts:
        raise PromptError(f"{texts.name}: there were no texts.")
    finished = shared.finish(folder, _by_text_and_piece)
    extracted.n_samples, extracted.size_bytes = finished or (0, 0)
    return extracted


def refuse_response(selection: Selection) -> None:
    """Raises SelectionError for positions that only a response has."""
    if selection.positions.part in ("response", "scored", *OF_THINKING):
        raise SelectionError(
            f"texts have no response, so that there are no {selection.positions}; keep all, last, or a slice."
        )


def _stored_pieces(writer: RunWriter) -> dict[tuple[int, int], int]:
    """(doc_id, window) of the pieces on the disk -> a hash of their text."""
    if not writer.n_samples:
        return {}
    columns = writer.table()
    keys = zip(columns.whole("doc_id"), columns.whole("window"), strict=True)
    return {key: _hash(prompt) for key, prompt in zip(keys, columns.whole("prompt"), strict=True)}


def _by_text_and_piece(columns: Columns) -> Columns:
    """The samples in the order of the texts, and of the pieces of each text."""
    return Ordered(columns, np.lexsort([columns.whole("window"), columns.whole("doc_id")]))


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def _missing(window: Sequence[Piece], stored: Mapping[tuple[int, int], int]) -> list[Piece]:
    """The pieces that are not on the disk. Raises OtherSettings when the disk holds another text in place of one."""
    for piece in window:
        if stored.get(piece.key, _hash(piece.text)) != _hash(piece.text):
            raise OtherSettings(
                f"text {piece.doc_id} ({piece.text[:40]!r} …) is another than the one on the disk: the texts changed. Name another folder."
            )
    return [piece for piece in window if piece.key not in stored]


def _named(samples: Iterable[Sample], name: str) -> list[Sample]:
    """The samples with the name of their set as their task."""
    return [Sample({**each.fields, "task": name}, each.input_ids, each.generated_ids, each.parts) for each in samples]


def _add_up(extracted: Extracted, pieces: TextPieces, ranks: Ranks) -> None:
    """Put the sums over all processes into `extracted`, whose n_tokens is that of this process before."""
    own = (pieces.n_texts, extracted.n_tokens, pieces.n_truncated, pieces.n_tokens_cut, pieces.lengths)
    extracted.n_tokens = 0
    for n_texts, n_tokens, n_truncated, n_tokens_cut, lengths in ranks.gathered(own):
        extracted.n_texts += n_texts
        extracted.n_tokens += n_tokens
        extracted.n_truncated += n_truncated
        extracted.n_tokens_cut += n_tokens_cut
        extracted.lengths += lengths

"""Makes padded batches of token ids from texts, or from the batches of a data loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.capture.batch_independence import Span, apart
from AutomaticEval.capture.texts.forward import Batch, padded
from AutomaticEval.capture.texts.sources import FIELDS, as_text, is_table, texts_of
from AutomaticEval.errors import ModelError, PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

SORTED_BATCHES = 64
"""How many batches' texts are sorted by length together, so that little of a batch is padding."""


class Batcher:
    """Makes batches of texts, of lists of token ids, or of what a data loader gives."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.n_truncated = 0
        """How many texts were longer than the model's context and were cut to it."""
        self._model, self._tokenizer, self._longest = loaded.model, loaded.tokenizer, loaded.context

    def batches(self, data: Iterable[Any] | Path, batch_size: int, most: int | None = None) -> Iterator[Batch]:
        """Batches of all of the data, or of the first items: at most `most` batches.

        data: texts, objects with a field that holds one, lists of token ids, or batches (a mapping with input_ids, a tensor of ids, or a
        tuple of ids and mask); a DataFrame or a Series of texts; the Path of a file of texts.
        Raises PromptError for an empty text and for what is neither text nor batch, ModelError for texts without a tokenizer.
        """
        if isinstance(data, str):
            raise PromptError("one text was given where a list of texts is expected; write [text].")
        if isinstance(data, Path) or is_table(data) or hasattr(data, "to_frame"):
            data = (each.text for each in texts_of(data))
        if hasattr(data, "keys") or (isinstance(data, tuple) and all(isinstance(each, Tensor) for each in data)):
            data = [data]  # one batch
        items = iter(data)
        beginning = list(itertools.islice(items, 1))
        items = itertools.chain(beginning, items)
        if not (beginning and _is_text(beginning[0])):
            yield from map(_given, itertools.islice(items, most))
            return
        items = itertools.islice(items, None if most is None else most * batch_size)
        while window := list(itertools.islice(items, SORTED_BATCHES * batch_size)):
            encoded = sorted((self._encoded(item) for item in window), key=len)
            for start in range(0, len(encoded), batch_size):
                batch = encoded[start : start + batch_size]
                for group in apart(self._model, [Span(len(each), len(each)) for each in batch]):
                    yield padded([batch[row] for row in group])

    def _encoded(self, item: Any) -> list[int]:
        if isinstance(item, Mapping):
            item = as_text(item).text
        if not _is_text(item) and item != []:
            raise PromptError(f"texts are strings or lists of token ids; found {type(item).__name__} among them.")
        if isinstance(item, str):
            if self._tokenizer is None:
                raise ModelError("texts were given without a tokenizer; pass tokenizer= too.")
            item = self._tokenizer(item)["input_ids"]
        if not item:
            raise PromptError("an empty text has no tokens; leave it out.")
        if self._longest is not None and len(item) > self._longest:
            self.n_truncated += 1
            item = item[: self._longest]
        return list(item)


def _is_text(item: Any) -> bool:
    if isinstance(item, Mapping):
        return "input_ids" not in item and any(field in item for field in FIELDS)
    return isinstance(item, str) or (isinstance(item, list) and bool(item) and isinstance(item[0], int))


def _given(item: Any) -> Batch:
    """The batch that a data loader gave as a mapping, a tensor of ids, or a tuple (ids, mask, ...)."""
    if isinstance(item, Mapping) or hasattr(item, "keys"):
        if "input_ids" not in item:
            raise PromptError(f"a batch has no input_ids; it has {', '.join(map(str, item.keys()))}.")
        ids, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, tuple | list):
        ids, mask = item[0], item[1] if len(item) > 1 else None
    else:
        ids, mask = item, None
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(f"a batch's input_ids are no numbers [batch, pos]: {type(ids).__name__}.") from None
    if ids.dim() != 2:
        raise PromptError(f"a batch's input_ids have shape {list(ids.shape)}; expected [batch, pos].")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if mask.shape != ids.shape:
        raise PromptError(f"a batch's attention_mask has shape {list(mask.shape)}; its input_ids {list(ids.shape)}.")
    return Batch(ids.cpu(), mask.cpu().bool())

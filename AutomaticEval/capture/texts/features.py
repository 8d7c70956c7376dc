"""Features for sparse autoencoders: the neurons of one layer over a data set, or of one text."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.capture.texts.batching import TextPieces
from AutomaticEval.capture.texts.extraction import Writing, extract
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.piece_forwards import PieceForwards
from AutomaticEval.capture.texts.sources import Text, as_text, name_of_texts, texts_of
from AutomaticEval.capture.texts.text_set import TextSet
from AutomaticEval.errors import PromptError, SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection
from AutomaticEval.store.disk.overwriting import Overwrite, parse_overwrite
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.row_array import RowArray
from AutomaticEval.store.writing.earlier_run import is_cut_short, new_run_folder, refuse_taken


class FromHuggingFace:
    """`mlp_post` of one layer (the input of the MLP's down projection) at every token of a data set.

    hf_model: a name, a folder, a loaded transformers model with tokenizer=, or a LoadedModel. dataset_name: a data set on the hub, a folder,
    a file of texts, or the texts themselves: a list, a generator, a DataFrame, objects with the field text_field. num_samples: how many texts; None for all. seq_length: longer texts are cut to so many tokens.
    inference_batch_size: texts a forward; None for as many as are fastest. save_features: the folder in which they are kept; True for a new
    one in `activations`; False keeps them in memory only. overwrite: True replaces the features in that folder, "version" writes beside them
    (features-2); without it only features that were cut short go on.
    In a gated MLP these numbers are the activation of the gate times the up projection, not the activation of the gate alone.
    Raises SelectionError for anything but one layer, PathExists for a folder that is taken, PromptError, ModelError.
    """

    def __init__(
        self,
        hf_model: Any,
        layer: int,
        dataset_name: Any,
        num_samples: int | None = None,
        seq_length: int | None = None,
        inference_batch_size: int | None = None,
        device: str = "auto",
        save_features: bool | str | Path = False,
        *,
        tokenizer: Any = None,
        split: str = "train",
        text_field: str | None = None,
        overwrite: Overwrite = False,
    ) -> None:
        self._overwrite = parse_overwrite(overwrite)
        self._folder = _folder_of(save_features, name_of_texts(dataset_name))
        if self._folder is not None and not self._goes_on:
            refuse_taken(self._folder, self._overwrite)  # before a large model loads
        self.loaded = _loaded(hf_model, device, tokenizer)
        self.selection = Selection.parse("mlp_post", layer)
        sites = self.selection.sites(self.loaded.layout.n_layers)
        if len(sites) != 1:
            raise SelectionError(f"layer is {layer!r}; name one, such as 6, or -1 for the last.")
        self.key = sites[0].key
        self._feeding = Feeding(seq_length=seq_length, batch_size=inference_batch_size)
        if num_samples is not None and num_samples < 1:
            raise PromptError(f"{num_samples} texts were asked for; at least 1 is needed.")
        self._most, self.name = num_samples, name_of_texts(dataset_name)
        self._texts = texts_of(dataset_name, split, text_field)
        self._is_used_up = False

    @property
    def _goes_on(self) -> bool:
        """Whether an extraction that was cut short is in the folder, and goes on."""
        return self._folder is not None and not self._overwrite and is_cut_short(self._folder)

    def extract_features(self) -> Tensor | RowArray:
        """[total_tokens, width], text after text, without padding: a tensor; when they are saved, an array that reads from the disk.

        Raises PromptError for no texts, SiteUnavailable, StoreError, PathExists for a folder that is taken.
        """
        if self._is_used_up:
            raise PromptError("the texts were an iterator, which can be gone through once; give a list.")
        self._is_used_up = iter(self._texts) is self._texts
        texts = islice(self._texts, self._most)
        if self._folder is not None:
            goes_on = self._goes_on
            folder = self._folder if goes_on else new_run_folder(self._folder, self._overwrite)
            text_set = TextSet(self.name, texts)
            extract(self.loaded, text_set, self.selection, folder, self._feeding, Writing(resume=goes_on))
            return open_run(folder).rows(self.key, by_sample=True)
        return self._in_memory(texts)

    def _in_memory(self, texts: Iterable[str | Text]) -> Tensor:
        forwards = PieceForwards(self.loaded, self.selection, self._feeding)
        pieces = TextPieces(self.loaded.tokenizer, self._feeding, forwards.longest)
        by_text: dict[int, Tensor] = {}
        for window in pieces.windows(enumerate(map(as_text, texts))):
            for _, samples in forwards.over(window):
                for sample in samples:
                    by_text[sample.fields["doc_id"]] = sample.parts[0].rows.activations[self.key]
        if not by_text:
            raise PromptError(f"{self.name}: there were no texts.")
        return torch.cat([by_text[number] for number in sorted(by_text)])


class ExtractSingleSample:
    """What `FromHuggingFace` gives, for one text at a time.

    max_length: longer texts are cut to so many tokens; None cuts them to the model's context.
    """

    def __init__(
        self, hf_model: Any, layer: int, max_length: int | None = None, device: str = "auto", *, tokenizer: Any = None
    ) -> None:
        self._features = FromHuggingFace(hf_model, layer, (), None, max_length, 1, device, tokenizer=tokenizer)

    def get_mlp_acts(self, text: str) -> Tensor:
        """[seq_length, width]. Raises PromptError for an empty text."""
        return self._features._in_memory([text])


def _folder_of(save_features: bool | str | Path, name: str) -> Path | None:
    """The folder in which features are kept; None keeps them in memory."""
    if save_features is True:
        return Path("activations") / f"features_{name}_{datetime.now():%Y%m%d_%H%M%S_%f}"
    return Path(save_features).expanduser() if save_features else None


def _loaded(model: Any, device: str, tokenizer: Any) -> LoadedModel:
    if isinstance(model, str | Path):
        return load_model(model, tokenizer=tokenizer, options=LoadOptions(device=device))
    return load_model(model, tokenizer=tokenizer)

"""A model that is loaded, with its tokenizer and its name; and what files say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from AutomaticEval import __version__
from AutomaticEval.models.architecture.description import description_text
from AutomaticEval.models.architecture.inner_model import virtual_tokens
from AutomaticEval.models.described.given_config import text_config
from AutomaticEval.models.described.remembered import description_of
from AutomaticEval.models.divided.division import n_processes
from AutomaticEval.models.edited_models import names_of, values_of
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.layout import Layout
from AutomaticEval.models.weights.fingerprint import fingerprint, sampled_fingerprint
from AutomaticEval.models.weights.provenance import adapters_of, library_versions, provenance
from AutomaticEval.settings import RunSettings

SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head")
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""Names that configs give to the length of the context, in the order in which they are tried."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer, and the name that files give it, which is never a path."""

    model: Any
    tokenizer: Any
    name: str
    loaded_with: Mapping[str, Any] = field(default_factory=dict)
    """The options, besides the name, that decide which weights the model has: peft, delta, subfolder, …"""

    paths: Mapping[str, str] = field(default_factory=dict)
    """model, peft and delta -> the path on this machine, of those that are folders."""

    @property
    def layout(self) -> Layout:
        """Where the model's sites are, verified. Raises UnsupportedModel."""
        return find_layout(self.model)

    @property
    def context(self) -> int | None:
        """The most tokens that the model can be fed, or None when its config does not say. Those of a soft prompt take a part of its context."""
        config, virtual = text_config(self.model), virtual_tokens(self.model)
        lengths = (getattr(config, name, None) for name in _CONTEXT_NAMES)
        n_virtual = 0 if virtual is None else virtual.n
        return next((int(length) - n_virtual for length in lengths if length and length > 0), None)  # XLNet says -1

    @property
    def shape(self) -> dict[str, int]:
        """n_layers, d_model, n_heads, n_kv_heads and d_head, for files: readers split q, k, v and z into heads by them."""
        layout = self.layout
        return {name: getattr(layout, name) for name in SHAPE}

    def sizes(self) -> dict[str, Any]:
        """The shape, and the heads of sites whose rows it does not cut rightly, as settings for files."""
        heads = self.layout.unlike_most()
        return {"shape": self.shape, **({"heads": heads} if heads else {})}

    def fingerprint(self) -> str:
        """A hash of every number of the model as it is now. Raises ModelError."""
        return fingerprint(self.model)

    def identity(self) -> RunSettings:
        """Which weights these are, for settings: the hash of every number, and the older hash that older runs hold."""
        return RunSettings().changed(model_hash=self.fingerprint(), fingerprint=sampled_fingerprint(self.model))

    def made_with(self) -> RunSettings:
        """What the settings of a run say of the model: its weights, its shape, and how it computes. Computed anew by each call."""
        identity = self.identity().as_dict()
        return self.numbers().changed(**identity, **self.sizes(), **provenance(self.model, self.tokenizer))

    def edit_values(self) -> dict[str, Any]:
        """The tensors that the model is edited with, which files keep beside the rows: `edits/<digest>` -> [n, width]."""
        return values_of(self.model)

    def numbers(self) -> RunSettings:
        """The settings that decide the numbers which the model gives, for files."""
        model = self.model
        description, n = description_of(model), n_processes(model)
        described = {"model_description": description_text(description)} if description.given else {}
        divided = {"n_processes": n} if n > 1 else {}
        some = {
            "edits": names_of(model),
            "loaded_with": {**self.loaded_with, **described, **divided},
            "adapters": adapters_of(model),
        }
        return RunSettings().changed(
            **{name: value for name, value in some.items() if value},
            dtype=str(model.dtype).removeprefix("torch."),
            attention=getattr(model.config, "_attn_implementation", None),
            device=str(model.device),
            quantization=quantization_of(model),
            revision=getattr(model.config, "_commit_hash", None),
            versions={
                "AutomaticEval": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **library_versions(model),
            },
        )


def quantization_of(model: Any) -> str | None:
    """How a model's weights are quantised: 8bit, 4bit, or the name of another method; None when they are not."""
    method = getattr(model, "quantization_method", None)
    if method is None:
        return None
    if getattr(model, "is_loaded_in_8bit", False):
        return "8bit"
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    return str(getattr(method, "value", method))


def computed_dtype(model: Any) -> torch.dtype:
    """The dtype to which a model rounds: its own, or bfloat16 where bitsandbytes has packed weights of 4 bits for a CPU with AVX512-BF16."""
    states = (getattr(getattr(each, "weight", None), "quant_state", None) for each in model.modules())
    dtype: torch.dtype = model.dtype
    return torch.bfloat16 if any(getattr(each, "packing_format_for_cpu", False) for each in states) else dtype

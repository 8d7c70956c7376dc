"""Which class of transformers makes the model of a config: a decoder of text, or an image-text model that is asked by text alone."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from AutomaticEval.errors import UnsupportedModel

CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)
"""The first that knows a config makes its model. Of some image-text configs, the first makes the language model without the vision tower,
as lm-eval's `hf` does: it gives the same logits over text, and is smaller."""


def model_class(config: Any, name: str) -> Any:
    """The Auto class that makes the model of a config. name: of the model, for errors.

    Raises UnsupportedModel for an encoder-decoder, and for a config that no class knows.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are asked and captured.")
    for each in CLASSES:
        if type(config) in each._model_mapping or each.__name__ in (getattr(config, "auto_map", None) or {}):
            return each
    raise UnsupportedModel(
        f"{name} has the model type {config.model_type!r}, and transformers {transformers.__version__} has no class of it that writes text: "
        f"neither {' nor '.join(each.__name__ for each in CLASSES)} knows its config. Name a checkpoint of a decoder or of an image-text model."
    )

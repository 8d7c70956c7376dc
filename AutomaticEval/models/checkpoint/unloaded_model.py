"""A named model without its weights, and its sites: from its config, its code, and one forward whose products with weights are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from AutomaticEval.errors import UnsupportedModel, first_line
from AutomaticEval.models.checkpoint.hub_failures import read_or_explain
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.model_sources import sources_of
from AutomaticEval.models.checkpoint.model_weights import config_of
from AutomaticEval.models.described.offered import not_found
from AutomaticEval.models.described.remembered import description_of, remember
from AutomaticEval.models.described.stand_ins import stand_ins, with_meta_weights
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.layout import Layout

SMALL_BYTES = 100 * 10**6
"""Weights in a folder of this machine that are read at once, rather than looked at from the config alone."""
WEIGHTS = (".safetensors", ".bin")


def has_small_weights(name: str, options: LoadOptions) -> bool:
    """Whether the weights of a model are on this machine, in a folder, and so small that loading them takes no time worth noticing."""
    sources = sources_of(name, options)
    folder = Path(sources.base, options.subfolder or "")
    sizes = [path.stat().st_size for path in folder.glob("*") if path.suffix in WEIGHTS] if folder.is_dir() else []
    return bool(sizes) and sum(sizes) <= SMALL_BYTES


def unloaded_model(name: str, options: LoadOptions) -> Any:
    """The model of a name or a folder, whose weights of two and more dimensions are on the meta device. No weights are read.

    Raises ModelUnavailable; UnsupportedModel for an encoder-decoder.
    """
    sources = sources_of(name, options)
    config = config_of(sources, options)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are asked and captured.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._experts_implementation = "eager"  # the other ways multiply by all experts at once, in dtypes of their own

    def made() -> Any:
        with with_meta_weights():
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=options.trust_remote_code, dtype=torch.float32
            )

    model = read_or_explain(sources.name, made).eval()
    remember(model, options.description)
    return model


def n_described_blocks(name: str, options: LoadOptions) -> int:
    """How many blocks a named model has, by its description, which names them. Raises what `unloaded_model` raises, and UnsupportedModel."""
    paths = options.description.blocks if options.description is not None else ()
    if len(paths) > 1:
        return len(paths)
    model = unloaded_model(name, options)
    found = [module for path, module in model.named_modules() if path in paths]
    if not found:
        raise not_found(model, description_of(model), f"{name} has no module {paths[0]} (blocks)", paths[0])
    return len(list(found[0].children()))


def unloaded_layout(model: Any) -> Layout:
    """Where the sites of an `unloaded_model` are, as its config and its code say.

    Every identity was checked on numbers of this code, in which each product with a weight was drawn at random. What the weights decide was not checked.
    Raises UnsupportedModel.
    """
    try:
        with stand_ins():
            return find_layout(model)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UnsupportedModel(
            f"{type(model).__name__} does not run without its weights ({first_line(error)}); load it: main.py sites --model … --verify."
        ) from error

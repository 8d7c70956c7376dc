"""A model of a checkpoint's configuration with random weights: what its architecture knows before it is trained."""

from __future__ import annotations

from typing import Any

import torch

from AutomaticEval.models.checkpoint.hub_failures import read_or_explain
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_class import model_class
from AutomaticEval.models.checkpoint.model_sources import sources_of
from AutomaticEval.models.checkpoint.model_weights import config_of, pick_device
from AutomaticEval.models.described.remembered import remember
from AutomaticEval.public_names import public_name


def random_model(name: str, options: LoadOptions, seed: int) -> LoadedModel:
    """The model of a name or a folder with the weights that transformers draws for a new one. It has no tokenizer; no weights are read.

    options: the dtype and the device count; adapters, deltas and quantisation do not. seed: draws the weights, on the CPU, so that they are the same for each device.
    Raises ModelUnavailable, DeviceUnavailable; UnsupportedModel for what is no decoder.
    """
    sources = sources_of(name, options)
    config = config_of(sources, options)
    kind = model_class(config, name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    device = pick_device(options.device)
    dtype = {} if options.dtype == "auto" else {"dtype": getattr(torch, options.dtype)}

    def made() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return kind.from_config(config, trust_remote_code=options.trust_remote_code, **dtype)

    model = read_or_explain(sources.name, made)
    remember(model, options.description)
    return LoadedModel(model.to(device).eval(), None, f"{public_name(name)} with random weights")

"""The model of a checkpoint with its weights: on which device, in which dtype, quantised or not, with its adapter or delta.

Quantisation is set up here and nowhere else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.distributed import DistributedConfig
from transformers.utils.logging import set_tqdm_hook

from AutomaticEval.errors import DeviceUnavailable, ModelError, ModelUnavailable
from AutomaticEval.models.checkpoint.hub_failures import read_or_explain
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.model_class import model_class
from AutomaticEval.models.checkpoint.model_sources import ModelSources, base_arguments
from AutomaticEval.models.checkpoint.quantised import loaded_or_explained, method_of, refuse_quantised, settle_weights
from AutomaticEval.models.weights.adapters import add_delta, resize, with_adapter
from AutomaticEval.processes import end_group_at_exit
from AutomaticEval.public_names import public_name

BAR_SECONDS = 2
"""Loading shows a bar once it takes longer. Of a small model it would be no more than a line that stays on the screen."""


def load_weights(sources: ModelSources, options: LoadOptions, tokenizer: Any) -> Any:
    """The model with its weights, in evaluation mode.

    tokenizer: needed for a model with an adapter, whose embeddings get a row for each token; else unused.
    Raises ModelUnavailable, DeviceUnavailable; UnsupportedModel for what is no decoder; ModelError.
    """
    arguments = _placement(options)
    config = config_of(sources, options)
    kind, method = model_class(config, sources.name), method_of(config)
    of_base = {**arguments, **base_arguments(sources, options)}
    if method is not None:
        refuse_quantised(sources.name, method, options)
        of_base.pop("quantization_config", None)  # the checkpoint's own
    model = read_or_explain(sources.name, lambda: _complete(kind, sources.name, sources.base, of_base, method))
    settle_weights(model)
    if sources.delta is not None:
        _add_delta_of(sources.delta, kind, model, options, arguments)
    if sources.adapter is not None:
        adapter = sources.adapter
        # lm-eval makes the embeddings fit the tokenizer; peft, which loads an adapter by its own name, only makes them larger
        resize(model, len(tokenizer), only_grow=sources.alone is not None)
        model = read_or_explain(
            adapter, lambda: with_adapter(model, adapter, options.revision, options.adapter), of_adapter=True
        )
    return model.eval()


def config_of(sources: ModelSources, options: LoadOptions) -> Any:
    """The config of the base, without its weights. Raises ModelUnavailable."""
    arguments = base_arguments(sources, options)
    return read_or_explain(sources.name, lambda: AutoConfig.from_pretrained(sources.base, **arguments))


def pick_device(device: str) -> str:
    """The torch device that `device` means on this machine. Raises DeviceUnavailable."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise DeviceUnavailable(f"no device {device!r}; write auto, cpu, mps, cuda or cuda:1.") from None
    is_there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there.get(kind, True):
        raise DeviceUnavailable(
            f"the device {device!r} was asked for, but torch sees no {kind} here; use --device auto."
        )
    return device


def _placement(options: LoadOptions) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the weights go, and in which numbers."""
    arguments: dict[str, Any] = {"device_map": options.device_map or {"": pick_device(options.device)}}
    if options.tp_plan:
        arguments = {"distributed_config": _division(options.tp_plan)}
    for name in ("max_memory", "offload_folder", "attn_implementation"):
        if getattr(options, name):
            arguments[name] = getattr(options, name)
    arguments["dtype"] = options.dtype
    if options.load_in_8bit or options.load_in_4bit:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for each product with float32 inputs
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.load_in_8bit, load_in_4bit=options.load_in_4bit, bnb_4bit_quant_type="nf4"
        )
    return arguments


def _division(tp_plan: str) -> DistributedConfig:
    """How weights are divided among the processes. Raises ModelError for a process that is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ModelError(
            "tp_plan divides a model among processes, and this process is alone; start several, as with torchrun --nproc_per_node 2."
        )
    end_group_at_exit()
    return DistributedConfig(tp_plan=tp_plan)


def _add_delta_of(source: str, kind: Any, model: Any, options: LoadOptions, placement: dict[str, Any]) -> None:
    """Add the weights of a delta to the model, in place."""
    arguments = {**placement, "revision": options.revision, "trust_remote_code": options.trust_remote_code}
    delta = read_or_explain(source, lambda: _complete(kind, str(options.delta), source, arguments))
    add_delta(model, delta, str(options.delta))


def _complete(kind: Any, name: str, source: str, arguments: dict[str, Any], method: str | None = None) -> Any:
    """The model of a checkpoint. kind: the Auto class that makes it. method: how it is quantised.

    Raises ModelUnavailable when weights are missing, which transformers would fill with random numbers.
    """

    def load() -> Any:
        return kind.from_pretrained(source, output_loading_info=True, **arguments)

    with _named_bar(f"Loading {public_name(name)}"):
        model, report = load() if method is None else loaded_or_explained(name, method, load)
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        raise ModelUnavailable(
            f"the checkpoint of {name!r} lacks {len(missing)} of the model's weights (first {missing[0]}): its config and "
            "its weights do not belong together."
        )
    return model


@contextmanager
def _named_bar(name: str) -> Iterator[None]:
    """Inside, a bar of transformers has this name, is shown after BAR_SECONDS, and is gone when it is full."""

    def named(factory: Any, args: tuple[Any, ...], how: dict[str, Any]) -> Any:
        return factory(*args, **{**how, "desc": name, "delay": BAR_SECONDS, "leave": False})

    before = set_tqdm_hook(named)
    try:
        yield
    finally:
        set_tqdm_hook(before)

"""The settings of a checkpoint's generation config by which keys and values are kept, and which of them cannot work here.

transformers finds that out in the middle of `generate`, in words of its own or of torch. Here it is said before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from AutomaticEval.errors import PromptError
from AutomaticEval.models.architecture.forward_call import cache_name, input_device

LIBRARIES = {"quanto": "optimum.quanto", "hqq": "hqq"}
"""Backend of quantised keys and values -> the module that it needs."""


def refuse_cache_settings(model: Any, given: Mapping[str, Any] = {}) -> None:
    """Raises PromptError for a cache that a model cannot generate with. given: the arguments for transformers' `generate`."""
    reason = why_not(model, given)
    if reason is not None:
        raise PromptError(f"{reason}, or set it to None in the model's generation_config.")


def why_not(model: Any, given: Mapping[str, Any]) -> str | None:
    """What is wrong with the settings of the cache, and what to do; None when nothing is known to be."""

    def setting(name: str) -> Any:
        return given.get(name, getattr(model.generation_config, name, None))

    chunk, kind = setting("prefill_chunk_size"), setting("cache_implementation")
    if chunk and cache_name(model) is None:
        return f"prefill_chunk_size={chunk} keeps the keys and values of each chunk, and {type(model).__name__} keeps none: leave it out"
    device = input_device(model).type
    if str(kind).startswith("offloaded") and device == "cpu":
        return f"cache_implementation={kind!r} moves keys and values from a GPU to the CPU, and the model is on the CPU: leave it out"
    if kind == "quantized":
        config = setting("cache_config")
        backend = (config if isinstance(config, Mapping) else vars(config or object)).get("backend", "quanto")
        library = LIBRARIES.get(backend)
        if library is not None and not _is_there(library):
            return f"cache_implementation='quantized' needs the library {library.replace('.', '-')}, which is not installed: install it"
    return None


def _is_there(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # of the package around it
        return False

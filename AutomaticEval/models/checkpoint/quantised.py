"""Checkpoints whose weights are quantised already: how, what that needs, and what cannot be asked of them. Loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from AutomaticEval.errors import ModelError, ModelUnavailable, first_line
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.weights.fingerprint import PACKED_ROWS

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto-round",),
    "awq": ("gptqmodel",),
    "bitsandbytes_4bit": ("bitsandbytes",),
    "bitsandbytes_8bit": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "eetq": ("kernels",),
    "gptq": ("gptqmodel", "optimum"),
    "hqq": ("hqq",),
    "quanto": ("optimum-quanto",),
    "quark": ("amd-quark",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
"""The packages that transformers (5.23) needs to run weights of a method. Those of other methods are read by it alone, or name their own."""
IN_EXTRA = ("compressed-tensors", "torchao")
"""Those of the extra `quantised`."""


def method_of(config: Any) -> str | None:
    """How the weights of a checkpoint are quantised, by transformers' own word; None when they are not."""
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    given: Mapping[str, Any] = about if isinstance(about, Mapping) else about.to_dict()
    method = given.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes" or given.get("load_in_8bit") or given.get("load_in_4bit"):
        return "bitsandbytes_4bit" if given.get("load_in_4bit") else "bitsandbytes_8bit"
    return method


def refuse_quantised(name: str, method: str, options: LoadOptions) -> None:
    """Raises ModelError for options that a quantised checkpoint excludes, ModelUnavailable for a method that cannot be run here."""
    asked = next((each for each in ("load_in_8bit", "load_in_4bit") if getattr(options, each)), None)
    if asked is not None and not is_bitsandbytes(method, options):
        raise ModelError(f"{name!r} is a checkpoint that is quantised already ({method}); leave {asked} out.")
    if options.delta:
        raise ModelError(
            f"{name!r} is quantised ({method}), and a delta cannot be added to such weights; give the base."
        )
    if method not in AUTO_QUANTIZER_MAPPING:  # transformers would take the numbers for plain weights
        raise ModelUnavailable(
            f"the weights of {name!r} are quantised by {method!r}, which this transformers does not know; it knows "
            f"{', '.join(sorted(AUTO_QUANTIZER_MAPPING))}."
        )
    missing = [each for each in PACKAGES.get(method, ()) if not _is_installed(each)]
    if missing:
        what = "'AutomaticEval[quantised]'" if set(missing) <= set(IN_EXTRA) else " ".join(missing)
        raise ModelUnavailable(
            f"{name!r} is quantised by {method}, which needs {' and '.join(missing)}, not installed here: pip install {what}"
        )


def is_bitsandbytes(method: str, options: LoadOptions) -> bool:
    """Whether the options ask for that which a checkpoint is already."""
    wanted = {"bitsandbytes_8bit": options.load_in_8bit, "bitsandbytes_4bit": options.load_in_4bit}
    return wanted.get(method, False)


def loaded_or_explained(name: str, method: str, load: Callable[[], Any]) -> Any:
    """What `load` returns, which loads a quantised checkpoint. Raises ModelUnavailable when the library of its method fails."""
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, AttributeError, KeyError, TypeError) as failure:
        raise ModelUnavailable(
            f"the checkpoint {name!r}, quantised by {method}, cannot be loaded here: {type(failure).__name__}: {first_line(failure)[:300]}"
        ) from failure


def settle_weights(model: Any) -> None:
    """Make a quantised model one that any forward leaves as it is.

    compressed-tensors would unpack the weights at the first forward. bitsandbytes would repack those of 4 bits for a CPU with AVX512-BF16, and
    fail (0.50) over a matrix whose rows do not come in 32s, or are no whole blocks: such a matrix is unpacked in each forward, as on other CPUs.
    """
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        is_repacked = state is not None and getattr(module, "support_avx512bf16_for_cpu", False)
        if is_repacked and (state.shape[0] % PACKED_ROWS or state.shape[1] % state.blocksize):
            module.support_avx512bf16_for_cpu = False


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True

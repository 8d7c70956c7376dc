"""What decides the numbers of a model besides its weights, as plain values for files: config, tokenizer, adapters, arithmetic, code."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.weights.active_adapters import active_names
from AutomaticEval.public_names import public_name

NOT_OF_THE_MODEL = frozenset(
    [
        "transformers_version",
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "id2label",
        "label2id",
        "problem_type",
        "pad_token_id",
        "_from_model_config",
    ]
)
"""Entries of configs that decide no number, or that settings hold under a name of their own."""

QUANTISERS = ("bitsandbytes", "torchao", "compressed-tensors")
"""The packages that compute with quantised weights, and whose names are those of the methods."""


def provenance(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What must be equal so that equal weights give equal numbers."""
    code = _code(model)
    return {
        "config": _plain(model.config),
        "generation_config": _plain(getattr(model, "generation_config", None)),
        "tokenizer": _tokenizer(tokenizer),
        "arithmetic": _arithmetic(model),
        **({} if code is None else {"code": code}),
    }


def adapters_of(model: Any) -> dict[str, Any]:
    """The name of each adapter -> its type, the base for which it was made, and whether it is active. {} without adapters."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    active = active_names(model)
    return {
        str(name): {
            "type": str(getattr(each.peft_type, "value", each.peft_type)),
            "base": each.base_model_name_or_path and public_name(each.base_model_name_or_path),
            "active": name in active,
        }
        for name, each in configs.items()
    }


def library_versions(model: Any) -> dict[str, str]:
    """Versions of the libraries, other than torch and transformers, that take part in a model's computation."""
    method = getattr(model, "quantization_method", None)
    method = str(getattr(method, "value", method))
    used = {name: name in method for name in QUANTISERS} | {"peft": bool(adapters_of(model))}
    return {name: version(name) for name, is_used in used.items() if is_used}


def _plain(config: Any) -> dict[str, Any]:
    """The entries of a config that differ from the defaults of its class."""
    if config is None:
        return {}
    try:
        entries = config.to_diff_dict()
    except TypeError:  # a class that cannot be made without arguments, and so has no defaults
        entries = config.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(_without(entries), default=_named, sort_keys=True))
    return plain


def _named(value: Any) -> Any:
    """A value that JSON does not have, as one that it has and that is the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return type(value).__name__ if " at 0x" in str(value) else str(value)


def _without(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries without those of NOT_OF_THE_MODEL, at any depth."""
    return {
        str(name): _without(value) if isinstance(value, Mapping) else value
        for name, value in entries.items()
        if name not in NOT_OF_THE_MODEL
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    """Hashes of everything that decides the token ids of a text. Padding is left out, because lm-eval sets it up as it needs it."""
    if tokenizer is None:
        return None
    pad, special = getattr(tokenizer, "pad_token", None), dict(getattr(tokenizer, "special_tokens_map", {}))
    kept = {name: str(value) for name, value in special.items() if name != "pad_token"}
    names = ("add_bos_token", "add_eos_token", "model_max_length", "clean_up_tokenization_spaces")
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": _hash(_vocabulary(tokenizer, None if pad in kept.values() else pad)),
        "chat_template": _hash(getattr(tokenizer, "chat_template", None)),
        "special": kept,
        **{name: getattr(tokenizer, name, None) for name in names},
    }


def _vocabulary(tokenizer: Any, pad: str | None) -> Any:
    """The vocabulary without a token that is only for padding, which may have been added after loading."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        return {token: number for token, number in vocabulary.items() if token != pad}
    whole = json.loads(backend.to_str())
    added = [each for each in whole.pop("added_tokens") if each["content"] != pad]
    return {**{name: each for name, each in whole.items() if name not in ("padding", "truncation")}, "added": added}


def _hash(value: Any) -> str | None:
    if value is None:
        return None
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=_named).encode(), digest_size=8).hexdigest()


def _arithmetic(model: Any) -> dict[str, Any]:
    """How torch computes at this moment."""
    device = input_device(model)  # not that of the weights, which is meta when they are offloaded
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    settings = {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "experts": getattr(model.config, "_experts_implementation", None),
    }
    if device.type != "cuda":
        return settings
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        **settings,
        "gpu": torch.cuda.get_device_name(device),
        "cudnn_tf32": bool(cudnn.allow_tf32),
        "reduced_bf16_sums": bool(matmul.allow_bf16_reduced_precision_reduction),
        "reduced_fp16_sums": bool(matmul.allow_fp16_reduced_precision_reduction),
    }


def _code(model: Any) -> str | None:
    """A hash of the code that came with a checkpoint (`trust_remote_code`); None for a model whose code is that of transformers."""
    kinds = {type(each) for each in [*model.modules(), model.config]}
    names = sorted({kind.__module__ for kind in kinds if kind.__module__.startswith("transformers_modules")})
    files = [inspect.getsourcefile(sys.modules[name]) for name in names if name in sys.modules]
    return _hash([Path(file).read_text(encoding="utf-8") for file in files if file]) if names else None

"""What a forward is given, what it gives, and who may run it: the conventions of transformers' models and modules."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.described.given_config import text_config
from AutomaticEval.models.described.remembered import description_of, embedding_of

_ACTIVATIONS = ("logits", "last_hidden_state")
"""Where an output of transformers holds its activation: that of a model with a head, and that of a body."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls keys and values: `cache` from version 5.24 on, one of the others before that."""

ENCODERS = frozenset(
    [
        *(
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
        ),
        *("roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    ]
)
"""Model types of encoders, which transformers also makes a decoder of, when their config says `is_decoder`."""


def tensor_of(value: Any, elements: Sequence[int] = ()) -> Tensor | None:
    """The activation in what a module was given or returned: logits, last_hidden_state, the tensor itself, or the first of a tuple. None without any.

    elements: the numbers of the elements of a tuple that are read instead, side by side.
    """
    if elements:
        return _side_by_side(value if isinstance(value, tuple | list) else [value], elements)
    for name in _ACTIVATIONS:
        if hasattr(value, name):
            value = getattr(value, name)
    if isinstance(value, dict) and "logits" in value:
        value = value["logits"]
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def with_tensor(value: Any, tensor: Tensor) -> Any:
    """What a module was given or returned, with tensor in place of the activation that `tensor_of` reads. The rest stays."""
    for name in _ACTIVATIONS:
        if hasattr(value, name):
            changed = copy(value)
            setattr(changed, name, tensor)
            return changed
    if isinstance(value, dict):
        return {**value, "logits": tensor}
    if isinstance(value, tuple | list):
        return type(value)([tensor, *value[1:]])
    return tensor


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any], elements: Sequence[int] = ()) -> Tensor | None:
    """The activation that a module is called with, by position or by name. None without any.

    elements: the numbers of the arguments that are read instead, side by side; those by name follow those by position.
    """
    if elements:
        return _side_by_side([*args, *kwargs.values()], elements)
    return tensor_of(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))


def _side_by_side(values: Sequence[Any], elements: Iterable[int]) -> Tensor | None:
    """Some of the values, [..., width] each, as one tensor [..., sum of widths]; None when one of them is no tensor.

    Several are given in float32, or in float64 where one of them is: both hold whole numbers up to 16777216 exactly.
    """
    chosen = [values[number] if number < len(values) else None for number in elements]
    tensors = [each for each in chosen if isinstance(each, Tensor)]
    if len(tensors) < len(chosen):
        return None
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([each.to(torch.promote_types(each.dtype, torch.float32)) for each in tensors], -1)


def forward_takes(model: Any) -> Collection[str]:
    """The names of the parameters of a model's forward. A model with adapters hands what it is given on to its inner model."""
    forward = inner(model).forward
    own = getattr(forward, "__func__", None)  # of a class; another function would be kept alive, and a model with it
    return inspect.signature(forward).parameters.keys() if own is None else _parameters(own)


def needed_besides_ids(model: Any) -> list[str]:
    """The names of what a model's forward must be given besides token ids, as some image-text models must be given an image."""
    own = list(inspect.signature(type(inner(model)).forward).parameters.values())[
        1:
    ]  # whoever has wrapped the forward of this one model
    named = (each for each in own if each.name != "input_ids")
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in named if each.default is inspect.Parameter.empty and each.kind not in kinds]


def attends_both_ways(model: Any) -> str | None:
    """The setting by which a model's tokens attend to the tokens behind them, as in an encoder; None for a decoder."""
    config = inner(model).config
    if getattr(config, "model_type", None) in ENCODERS and not getattr(config, "is_decoder", False):
        return "is_decoder=False"
    both = getattr(text_config(inner(model)), "use_bidirectional_attention", None)
    return f"use_bidirectional_attention={both!r}" if both in (True, "all") else None


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(function).parameters.keys()


def with_cache(model: Any) -> dict[str, bool]:
    """The argument that asks a forward for keys and values; {} for a forward of people's own that knows no such argument."""
    takes = inspect.signature(inner(model).forward).parameters.values()
    is_known = any(each.name == "use_cache" or each.kind is each.VAR_KEYWORD for each in takes)
    return {"use_cache": True} if is_known else {}


def takes_few_logits(model: Any) -> bool:
    """Whether a forward can be told to compute the logits of its last columns alone, and everything else at all columns.

    A model whose layers share keys and values with layers below cannot: told so, those layers skip the other columns, too.
    """
    shares = getattr(text_config(inner(model)), "num_kv_shared_layers", None)
    return "logits_to_keep" in forward_takes(model) and not shares


def cache_name(model: Any) -> str | None:
    """The name under which a model's forward, and its `generate`, take keys and values. None when they take none."""
    names = forward_takes(model)
    return next((name for name in CACHE_NAMES[:2] if name in names), None)


def cache_in(given: object) -> Any:
    """The keys and values among the named arguments of a forward, or in its output. None without any."""
    if not isinstance(given, Mapping):
        return None
    return next((cache for name in CACHE_NAMES if (cache := given.get(name)) is not None), None)


def without_cache(model: Any) -> dict[str, bool]:
    """The argument with which `generate` makes no keys and values, for a described model whose forward takes none under any name."""
    takes = {*forward_takes(model)}
    has_none = not takes & {*CACHE_NAMES, "use_cache"}
    return {"use_cache": False} if has_none and description_of(model).given else {}


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_making_locks = threading.Lock()


def alone_with(model: nn.Module) -> threading.RLock:
    """The lock of a model. Hooks see every forward of the model, so only one thread may run it at a time."""
    model = inner(model)
    lock = _locks.get(model)
    if lock is None:
        with _making_locks:
            lock = _locks.setdefault(model, threading.RLock())
    return lock


def input_device(model: Any) -> torch.device:
    """The device that token ids are sent to: the embedding's, or the CPU when the embedding is offloaded."""
    device: torch.device = embedding_of(model).weight.device
    return torch.device("cpu") if device.type == "meta" else device


def few_ids(model: Any, n_tokens: int) -> Tensor:
    """Token ids for a small forward that shows how a model works: [1, n_tokens], on the model's input device."""
    n_ids = embedding_of(model).weight.shape[0]  # adapted embeddings have this, but no num_embeddings
    ids: Tensor = torch.arange(1, n_tokens + 1, device=input_device(model))[None] % n_ids
    return ids

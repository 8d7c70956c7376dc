"""Places to read in a model, and one model's places for every site. Knows not how they are found (`layout.py`)."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.heads import HeadResultNorms
from AutomaticEval.sites import KINDS, Site


@dataclass(frozen=True)
class Tap:
    """One place to read: a module's input or output, and what to take of it."""

    module: str
    """Dotted path in the model; "" is the model itself, whose output is its logits."""

    end: Literal["input", "output"]

    scale: float = 1.0
    """What the model multiplies the value by before it uses it (Granite's residual multiplier)."""

    columns: tuple[int, ...] | None = None
    """Features to take, for projections that hold several sites; None for all."""

    then: HeadResultNorms | None = None
    """What is derived of them."""

    def take(self, value: Tensor) -> Tensor:
        """value: [..., width of the module]. Returns [..., width of the site]."""
        if self.columns is not None:
            value = value[..., torch.tensor(self.columns, dtype=torch.long, device=value.device)]
        value = value if self.scale == 1.0 else value * self.scale
        return value if self.then is None else self.then(value)

    def put(self, value: Tensor, taken: Tensor) -> Tensor:
        """A copy of value, of which `take` gives `taken`."""
        unscaled = taken if self.scale == 1.0 else taken / self.scale
        if self.columns is None:
            return unscaled
        changed = value.clone()
        changed[..., torch.tensor(self.columns, device=value.device)] = unscaled
        return changed


@dataclass(frozen=True)
class Layout:
    """The verified places of every site of one model."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    embedding: str
    """Dotted path of the token embedding: its input is the token ids that are fed."""

    taps: Mapping[Site, Tap]
    widths: Mapping[Site, int]
    missing: Mapping[str, str] = field(default_factory=dict)
    """Kinds that this model lacks somewhere, and why."""

    def pick(self, sites: Iterable[Site]) -> dict[str, Tap]:
        """Key -> tap. Raises SiteUnavailable, with the reason, for a site that this model lacks."""
        chosen = {}
        for site in sites:
            if site not in self.taps:
                have = ", ".join(kind for kind in KINDS if kind not in self.missing)
                reason = self.missing.get(site.kind, "it was not found in the module tree")
                raise SiteUnavailable(f"this model has no {site.kind!r} at {site.key}: {reason}. It has: {have}.")
            chosen[site.key] = self.taps[site]
        return chosen


def tensor_of(value: Any) -> Tensor | None:
    """The activation in what a module was given or returned: the logits, a tensor, or a tuple's first; else None."""
    if hasattr(value, "logits"):
        value = value.logits
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def with_tensor(value: Any, tensor: Tensor) -> Any:
    """What `tensor_of` reads, with another activation in its place; the rest as it was."""
    if hasattr(value, "logits"):
        changed = copy(value)
        changed.logits = tensor
        return changed
    if isinstance(value, tuple | list):
        return type(value)([tensor, *value[1:]])
    return tensor


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The activation that a module is called with, positionally or by name."""
    return tensor_of(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))


def forward_takes(model: Any) -> Collection[str]:
    """Names of what a model's forward takes; of one with adapters, the base model's, to which it hands on what it is given."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters.keys()


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls keys and values: `cache` from 5.24 on, before that one of the others."""


def cache_name(model: Any) -> str | None:
    """What a model's forward, and its `generate`, call keys and values; None when it takes none."""
    takes = forward_takes(model)
    return next((name for name in CACHE_NAMES[:2] if name in takes), None)


def cache_in(given: object) -> Any:
    """The keys and values among what a forward is given by name, or in its output; None without any."""
    if not isinstance(given, Mapping):
        return None
    return next((found for name in CACHE_NAMES if (found := given.get(name)) is not None), None)


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_making_locks = threading.Lock()


def alone_with(model: nn.Module) -> threading.RLock:
    """The lock of a model: hooks see every forward, so that only one thread may run it at a time."""
    with _making_locks:
        return _locks.setdefault(model, threading.RLock())


def input_device(model: Any) -> torch.device:
    """Where token ids go: beside the embedding, or to the CPU when the embedding is offloaded."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device

"""Places to read in a model, and one model's places for every site. Knows not how they are found (`find_layout.py`)."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.head_weights import HeadResultNorms
from AutomaticEval.sites import KINDS, TABLE, Site


@dataclass(frozen=True)
class Tap:
    """One place to read: a module's input or output, and what to take of it."""

    module: str
    """Dotted path in the model; "" is the model itself, whose output is its logits. Of one with adapters, its inner model's is."""

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
    missing: Mapping[Site, str] = field(default_factory=dict)
    """Sites that this model lacks, and why: of a layer, said of its block."""

    @property
    def whole(self) -> str:
        """Dotted path of the module that runs in every way of calling the model (`inner`); "" is the model itself."""
        return self.taps[Site("logits")].module

    def under(self, prefix: str) -> Layout:
        """The same sites with longer module paths: for a model that holds this one under the path prefix."""
        taps = {site: replace(tap, module=f"{prefix}.{tap.module}".strip(".")) for site, tap in self.taps.items()}
        return replace(self, embedding=f"{prefix}.{self.embedding}", taps=taps)

    def sites(self, kind: str) -> list[Site]:
        """All of a kind, whether the model has them or not."""
        is_per_layer = TABLE[kind].is_per_layer
        return [Site(kind, layer) for layer in range(self.n_layers)] if is_per_layer else [Site(kind)]

    def heads_of(self, kind: str) -> int:
        """How many heads stand side by side in a row of a kind; 0 for a kind without heads."""
        name = TABLE[kind].heads
        return 0 if name is None else int(getattr(self, name))

    def lacking(self, kind: str) -> dict[str, list[Site]]:
        """Why the model has not all sites of a kind: reason -> the sites that it holds for."""
        found: dict[str, list[Site]] = {}
        for site in self.sites(kind):
            if site not in self.taps:
                found.setdefault(self._reason(site), []).append(site)
        return found

    def pick(self, sites: Iterable[Site]) -> dict[str, Tap]:
        """Key -> tap. Raises SiteUnavailable, with its own reason, for a site that this model lacks."""
        chosen = {}
        for site in sites:
            if site not in self.taps:
                others = [
                    other.layer for other in self.sites(site.kind) if other in self.taps and other.layer is not None
                ]
                elsewhere = f" It has {site.kind!r} in {layers_text(others)}." if others else ""
                have = ", ".join(kind for kind in KINDS if not self.lacking(kind))
                raise SiteUnavailable(
                    f"this model has no {site.kind!r} at {site.key}: {self._reason(site)}.{elsewhere} It has everywhere: {have}."
                )
            chosen[site.key] = self.taps[site]
        return chosen

    def _reason(self, site: Site) -> str:
        if site.layer is not None and not 0 <= site.layer < self.n_layers:
            return f"it has {self.n_layers} layers, 0 to {self.n_layers - 1}"
        return self.missing.get(site) or TABLE[site.kind].not_stored or "it was not found in the module tree"


def layers_text(layers: Iterable[int]) -> str:
    """Ascending layers as people read them: "layer 3", "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' if sum(map(len, runs)) > 1 else ''} {text}"


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
    return inspect.signature(inner(model).forward).parameters.keys()


def takes_few_logits(model: Any) -> bool:
    """Whether a forward can be told to compute the logits of its last columns alone, and all else as ever.

    Layers that share keys and values with those below compute no other columns either, when they are told so.
    """
    shares = getattr(inner(model).config.get_text_config(), "num_kv_shared_layers", None)
    return "logits_to_keep" in forward_takes(model) and not shares


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
    model = inner(model)
    found = _locks.get(model)
    if found is None:
        with _making_locks:
            found = _locks.setdefault(model, threading.RLock())
    return found


def input_device(model: Any) -> torch.device:
    """Where token ids go: beside the embedding, or to the CPU when the embedding is offloaded."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def few_ids(model: Any, n_tokens: int) -> Tensor:
    """Token ids to look at a model with: [1, n_tokens], where it takes them."""
    n_ids = model.get_input_embeddings().weight.shape[0]  # of adapted embeddings, too, which say no num_embeddings
    ids: Tensor = torch.arange(1, n_tokens + 1, device=input_device(model))[None] % n_ids
    return ids

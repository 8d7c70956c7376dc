"""The layout of one model: for each site, the place where it is read. `find_layout.py` finds these places."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable, warn
from AutomaticEval.sites import KINDS, TABLE, Site, key_order


class Derived(Protocol):
    """Computes something of the value that is read: rows [..., width] -> [..., width of what is kept]. It looks at each row alone."""

    @property
    def mark(self) -> Hashable:
        """Two whose marks are equal compute the same. A mark keeps alive what it tells apart by identity."""

    def refresh(self, module: nn.Module, /) -> None:
        """Is called before a forward, with the module that is read."""

    def __call__(self, value: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Tap:
    """One place where a model is read: the input or the output of a module, and what is taken of it."""

    module: str
    """Dotted path of the module in the model. "" is the model itself; the output of the inner model (`inner`) is the logits."""

    end: Literal["input", "output"]
    """Which of the two is read."""

    scale: float = 1.0
    """What the model multiplies the value by before it uses it (Granite's residual multiplier)."""

    earlier: tuple[str, ...] = ()
    """Paths of modules that run before `module`, whose outputs the model adds to its output. The value is the sum, added in the order in which they run."""

    columns: tuple[int, ...] | None = None
    """The features to take, for a projection whose output holds several sites. None takes all."""

    stream: int | None = None
    """Which stream is read of a value that holds several, [stream, batch, pos, width]. None: the value is one stream."""

    clip: float | None = None
    """The model clips the value to between -clip and clip before it uses it (OLMo's `clip_qkv`). It does so with what an edit puts there, too."""

    heads_apart: bool = False
    """Whether the value has an axis of heads, [batch, pos, n_heads, d_head], as what a norm of each head gives. `joined` takes it away."""

    elements: tuple[int, ...] = ()
    """The numbers of the arguments, or of the elements of an output tuple, that are read, side by side. Empty reads the activation, which is the first."""

    then: Derived | None = None
    """What is computed of the value, for a derived site and for rows that are reduced. None keeps the value."""

    _column_numbers: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def stream_of(self, value: Tensor) -> Tensor:
        """The one stream that is read. value: [batch, pos, width]; of several streams [stream, batch, pos, width]."""
        return value if self.stream is None else value[self.stream]

    def with_stream(self, value: Tensor, changed: Tensor) -> Tensor:
        """A value in which `stream_of` finds what was changed; other streams are as they were."""
        if self.stream is None:
            return changed
        whole = value.clone()
        whole[self.stream] = changed
        return whole

    def summed(self, outputs: Sequence[Tensor]) -> Tensor:
        """The sum of what the earlier modules and the module itself give, [..., width] each, in the shape of the last."""
        total = outputs[0].reshape(outputs[-1].shape)
        for each in outputs[1:]:
            total = total + each.reshape(outputs[-1].shape)
        return total

    def joined(self, value: Tensor) -> Tensor:
        """What the module is given or gives, with the features of all heads side by side: [..., width of the module]."""
        return value.flatten(-2) if self.heads_apart else value

    def take(self, value: Tensor) -> Tensor:
        """The site's values. value: [..., width of the module]. Returns [..., width of the site]."""
        if self.columns is not None:
            value = value[..., self._columns_on(value.device)]
        value = value if self.scale == 1.0 else value * self.scale
        value = value if self.clip is None else value.clamp(-self.clip, self.clip)
        return value if self.then is None else self.then(value)

    def _columns_on(self, device: torch.device) -> Tensor:
        """The columns as a tensor, made once: each making is a copy to the device, which waits for it, and which no graph can record."""
        if device not in self._column_numbers:
            with torch.inference_mode(False):
                self._column_numbers[device] = torch.tensor(self.columns, dtype=torch.long, device=device)
        return self._column_numbers[device]

    def under(self, prefix: str) -> Tap:
        """This tap in a model that holds the tap's model under the dotted path prefix."""
        module, *earlier = (f"{prefix}.{path}".strip(".") for path in (self.module, *self.earlier))
        return replace(self, module=module, earlier=tuple(earlier))

    def put(self, value: Tensor, taken: Tensor) -> Tensor:
        """A copy of value that is changed so that `take` gives `taken`. Not for derived sites."""
        unscaled = taken if self.scale == 1.0 else taken / self.scale
        if self.columns is None:
            return unscaled
        changed = value.clone()
        changed[..., self._columns_on(value.device)] = unscaled
        return changed


@dataclass(frozen=True)
class Layout:
    """The sizes of one model, and the verified place of every site that it has."""

    n_layers: int
    d_model: int
    n_heads: int
    """The heads of queries, the same in all layers that have q or z."""
    n_kv_heads: int
    """The heads of keys and values, in most layers."""
    d_head: int
    """The width of a head's query, in most layers. `widths` and `heads_at` say how wide a head is at a site."""
    embedding: str
    """Dotted path of the token embedding. Its input is the token ids that are fed."""

    taps: Mapping[Site, Tap]
    """Where each site is read. A site that the model lacks is not among them."""

    widths: Mapping[Site, int]
    """The width of each of these sites: how many numbers a token has there."""

    norm: str | None = None
    """Dotted path of the final norm, which may be used elsewhere, too. None without any."""

    notes: Mapping[str, str] = field(default_factory=dict)
    """Kind -> what has to be said of it in this model: which of several residual streams is read, say."""

    missing: Mapping[Site, str] = field(default_factory=dict)
    """The sites that this model lacks, and why. For a site of a layer, the reason speaks of that layer's block as "its block"."""

    whole: str = ""
    """Dotted path of the inner model, which runs in every way of calling the model; "" is the model itself."""

    other_heads: Mapping[Site, int] = field(default_factory=dict)
    """How many heads a row of a site holds, where it is not the number that most layers have."""

    def under(self, prefix: str) -> Layout:
        """This layout for a model that holds this one under the dotted path prefix: the paths begin with it."""
        taps = {site: tap.under(prefix) for site, tap in self.taps.items()}
        whole = f"{prefix}.{self.whole}".strip(".")
        norm = None if self.norm is None else f"{prefix}.{self.norm}"
        return replace(self, embedding=f"{prefix}.{self.embedding}", taps=taps, whole=whole, norm=norm)

    def sites(self, kind: str) -> list[Site]:
        """All sites of a kind, whether the model has them or not."""
        is_per_layer = TABLE[kind].is_per_layer
        return [Site(kind, layer) for layer in range(self.n_layers)] if is_per_layer else [Site(kind)]

    def layers_of(self, kind: str) -> list[int]:
        """The layers that have a site of a kind; all layers when none has, so that `pick` says why."""
        every = [site for site in self.sites(kind) if site.layer is not None]
        return [int(site.layer or 0) for site in every if site in self.taps] or list(range(len(every)))

    def heads_at(self, site: Site) -> int:
        """How many heads stand side by side in a row of a site, all equally wide; 0 for a kind without heads."""
        name = TABLE[site.kind].heads
        return 0 if name is None else self.other_heads.get(site, int(getattr(self, name)))

    def unlike_most(self) -> dict[str, int]:
        """The sites whose rows `n_heads`, `n_kv_heads` and `d_head` do not cut rightly into heads: key -> how many heads a row holds."""
        found = {}
        for site, width in sorted(self.widths.items(), key=lambda item: key_order(item[0].key)):
            n = self.heads_at(site)
            if n and (
                site in self.other_heads or width != prod(getattr(self, size) for size in TABLE[site.kind].width)
            ):
                found[site.key] = n
        return found

    def lacking(self, kind: str) -> dict[str, list[Site]]:
        """Why the model lacks sites of a kind: reason -> the sites that it explains. Empty when the model has all of them."""
        reasons: dict[str, list[Site]] = {}
        for site in self.sites(kind):
            if site not in self.taps:
                reasons.setdefault(self._reason(site), []).append(site)
        return reasons

    def where_held(self, sites: Iterable[Site]) -> list[Site]:
        """Some sites, without those that their layers lack while other layers have sites of that kind. A warning says which are left out.

        Sites of a kind that no layer has stay, so that `pick` refuses them.
        """
        given = list(sites)
        held = {site.kind for site in given if site in self.taps}
        kept = [site for site in given if site in self.taps or site.kind not in held]
        for kind in dict.fromkeys(site.kind for site in given if site not in kept):
            has = layers_text(site.layer for site in kept if site.kind == kind and site.layer is not None)
            reasons = dict.fromkeys(self._reason(site) for site in given if site.kind == kind and site not in kept)
            more = "" if len(reasons) == 1 else "; and other reasons in other layers"
            warn(f"{kind} is kept in {has}: the other layers have none ({next(iter(reasons))}{more}).")
        return kept

    def pick(self, sites: Iterable[Site]) -> dict[str, Tap]:
        """The taps of some sites: key -> tap. Raises SiteUnavailable, with the reason, for a site that this model lacks."""
        chosen = {}
        for site in sites:
            if site not in self.taps:
                others = [
                    other.layer for other in self.sites(site.kind) if other in self.taps and other.layer is not None
                ]
                elsewhere = f" It has {site.kind!r} in {layers_text(others)}." if others else ""
                complete = ", ".join(kind for kind in KINDS if not self.lacking(kind))
                raise SiteUnavailable(
                    f"this model has no {site.kind!r} at {site.key}: {self._reason(site)}.{elsewhere} It has everywhere: {complete}."
                )
            chosen[site.key] = self.taps[site]
        return chosen

    def _reason(self, site: Site) -> str:
        if site.layer is not None and not 0 <= site.layer < self.n_layers:
            return f"it has {self.n_layers} layers, 0 to {self.n_layers - 1}"
        kind = TABLE[site.kind]
        return self.missing.get(site) or kind.not_stored or kind.absent or "it was not found in the module tree"


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

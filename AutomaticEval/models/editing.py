"""`editing`: change chosen sites of a model while it runs, whoever runs it.

An edit changes what the next part of the model receives; `capturing`, whether around it or within, then records what was received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.errors import EditError
from AutomaticEval.models.hooks import Keep, Kept
from AutomaticEval.models.layout import find_layout
from AutomaticEval.models.taps import Layout, Tap, alone_with, input_of, tensor_of, with_tensor
from AutomaticEval.sites import Site, site_of

NOT_EDITED = {
    "head_result_norm": "it is derived; edit z instead",
    "resid_mid": "it is read where the MLP alone receives it, and the stream goes on beside it; edit attn_out instead",
}
"""Kinds that are read in a place where a change would mean something else."""


@dataclass(frozen=True)
class Edit:
    """One intervention at one site.

    >>> with editing(model, [Edit.scale("layer_3.z", 0.0, heads=[5])]):  # head 5 of layer 3 is ablated
    ...     model.generate(**inputs, max_new_tokens=15)
    """

    site: str | Site
    """A site, or its key: layer_3.z, layer_3 (the residual stream after block 3), embeddings, logits."""

    change: Callable[[Tensor], Tensor]
    """Takes the values, gives others of the same shape: [batch, columns, width], or [n, width] with `where`; with `heads`
    [..., n heads, d_head] in place of [..., width]. What it is given must not be changed in place."""

    heads: Sequence[int] | None = None
    """Of z and q: which heads; of k and v: which key-value heads. None for all, as one width."""

    where: Keep | None = None
    """where(first column, number of columns) -> the (row, column) pairs of a forward that are changed; None for all."""

    @classmethod
    def replace(cls, site: str | Site, value: Tensor | float, **how: Any) -> Edit:
        """value: broadcast to what is changed. how: heads, where."""
        return cls(site, lambda found: _like(value, found).expand_as(found).clone(), **how)

    @classmethod
    def add(cls, site: str | Site, value: Tensor | float, **how: Any) -> Edit:
        return cls(site, lambda found: found + _like(value, found), **how)

    @classmethod
    def scale(cls, site: str | Site, factor: float, **how: Any) -> Edit:
        """factor: 0.0 ablates to zero, also what is infinite or NaN."""
        return cls(site, lambda found: torch.zeros_like(found) if factor == 0 else found * factor, **how)

    @classmethod
    def project_out(cls, site: str | Site, direction: Tensor, **how: Any) -> Edit:
        """direction: [width] or [d_head]: what is changed has no part along it any more. Raises EditError for zeros."""
        length = float(direction.double().norm())
        if not 0 < length < float("inf"):
            raise EditError(f"the direction to project out of {site} has the length {length}; it needs one.")

        def without(found: Tensor) -> Tensor:
            unit = _like(direction.double() / length, found)
            return found - (found * unit).sum(-1, keepdim=True) * unit

        return cls(site, without, **how)


def _like(value: Tensor | float, found: Tensor) -> Tensor:
    return torch.as_tensor(value).to(device=found.device, dtype=found.dtype)


@contextmanager
def editing(model: nn.Module, edits: Iterable[Edit]) -> Iterator[None]:
    """Make edits in every forward inside the with; at one site they follow one another as they are listed.

    model: a transformers decoder. Of nested withs the inner one's edits come first.
    Raises EditError for an edit that cannot be made, SiteUnavailable and UnknownSite for its site; and after the with when an edit
    was not made in every forward.
    """
    edits = list(edits)
    layout = find_layout(model)
    made = [_Made(model, layout, edit) for edit in edits]
    columns = _Columns()
    with ExitStack() as hooks:
        hooks.enter_context(alone_with(model))
        embedding = model.get_submodule(layout.embedding)
        hooks.callback(embedding.register_forward_pre_hook(columns.feed, with_kwargs=True, prepend=True).remove)
        for each in reversed(made):  # each goes before those that are there, capturing's among them
            hooks.callback(each.install(columns))
        yield
    for each in made:
        if each.n_fired != columns.n_forwards:
            raise EditError(f"the edit of {each.key} was made in {each.n_fired} of {columns.n_forwards} forwards.")


class _Columns:
    """Which columns the current forward feeds."""

    def __init__(self) -> None:
        self.first = self.n = self.n_forwards = 0

    def feed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = input_of(args, kwargs)
        if ids is None or ids.dim() != 2:
            raise EditError(
                f"the embedding was given ids of shape {None if ids is None else tuple(ids.shape)}; expected two axes."
            )
        self.first += self.n
        self.n = ids.shape[1]
        self.n_forwards += 1


class _Made:
    """One edit in one model."""

    def __init__(self, model: nn.Module, layout: Layout, edit: Edit) -> None:
        self.edit, self.n_fired = edit, 0
        site = edit.site if isinstance(edit.site, Site) else site_of(edit.site)
        self.key = site.key
        if site.kind in NOT_EDITED:
            raise EditError(f"{self.key} cannot be edited: {NOT_EDITED[site.kind]}.")
        self.tap: Tap = layout.pick([site])[site.key]
        self.module = model.get_submodule(self.tap.module)
        self.n_heads = {"z": layout.n_heads, "q": layout.n_heads}.get(site.kind, layout.n_kv_heads)
        for head in edit.heads if edit.heads is not None else ():
            if site.kind not in ("z", "q", "k", "v"):
                raise EditError(f"{self.key} has no heads; z, q, k and v have.")
            if not 0 <= head < self.n_heads:
                raise EditError(f"{self.key} has no head {head}: it has {self.n_heads}, 0 to {self.n_heads - 1}.")

    def install(self, columns: _Columns) -> Callable[[], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = self._changed(input_of(args, kwargs), columns)
            if args:
                return (with_tensor(args[0], changed), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: with_tensor(kwargs[name], changed)}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return with_tensor(output, self._changed(tensor_of(output), columns))

        if self.tap.end == "input":
            return self.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove
        return self.module.register_forward_hook(after, prepend=True).remove

    def _changed(self, value: Tensor | None, columns: _Columns) -> Tensor:
        """What a module gives or is given, edited. value: [batch, columns, width], or its first two axes as one."""
        if value is None:
            raise EditError(f"the module of {self.key} ({self.tap.module}) gave no tensor.")
        self.n_fired += 1
        whole = value.view(-1, columns.n, value.shape[-1]) if value.dim() == 2 else value
        if self.edit.where is None:
            changed = self.tap.put(whole, self._of(self.tap.take(whole)))
        else:
            kept = self.edit.where(columns.first, columns.n)
            changed = whole if kept is None or not len(kept.rows) else self._at(kept, whole, columns)
        return changed.reshape(value.shape)

    def _at(self, kept: Kept, whole: Tensor, columns: _Columns) -> Tensor:
        lacking = columns.n - whole.shape[1]  # logits are computed for the last columns only
        rows, column = kept.rows.to(whole.device), kept.columns.to(whole.device) - columns.first - lacking
        if int(column.min()) < 0:
            raise EditError(f"{self.key} was not computed at {int((column < 0).sum())} of the positions to edit.")
        changed, some = whole.clone(), whole[rows, column]
        changed[rows, column] = self.tap.put(some, self._of(self.tap.take(some)))
        return changed

    def _of(self, found: Tensor) -> Tensor:
        """The values of a site, changed in the heads that are edited."""
        if self.edit.heads is None:
            return self._same_shape(self.edit.change(found), found)
        heads = torch.tensor(list(self.edit.heads), device=found.device)
        split = found.reshape(*found.shape[:-1], self.n_heads, -1)
        some = split.index_select(-2, heads)
        changed = split.clone()
        changed[..., heads, :] = self._same_shape(self.edit.change(some), some)
        return changed.flatten(-2)

    def _same_shape(self, changed: Tensor, found: Tensor) -> Tensor:
        if changed.shape != found.shape:
            raise EditError(
                f"the edit of {self.key} gave values of shape {list(changed.shape)}; expected {list(found.shape)}."
            )
        return changed.to(device=found.device, dtype=found.dtype)

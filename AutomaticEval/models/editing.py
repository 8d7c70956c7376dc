"""`editing`: change chosen sites of a model while it runs, whoever runs it.

An edit changes what the next part of the model receives; `capturing`, whether around it or within, then records what was received.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.errors import EditError
from AutomaticEval.models.architecture.forward_call import alone_with, cache_in, input_of, tensor_of, with_tensor
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.edited_models import noted
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.recording import Keep, Kept
from AutomaticEval.sites import TABLE, Site, site_of


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
    """Which heads of z or q, or which key-value heads of k or v, are changed. None changes the whole width."""

    where: Keep | None = None
    """where(first column, number of columns) -> the (row, column) pairs of a forward that are changed; None for all."""

    is_positionwise: bool = False
    """Whether a position's new values depend on its own alone. An edit of which that is not so, or that has `where`, keeps lm-eval's runs
    from computing what requests share once: it would be made in other rows and columns there."""

    name: str = "change"
    """For the settings of runs that are made with it."""

    value: Tensor | float | None = None
    """What it is made with; for the same."""

    @classmethod
    def replace(cls, site: str | Site, value: Tensor | float, **how: Any) -> Edit:
        """value: broadcast to what is changed. how: heads, where."""
        return cls(site, lambda found: _like(value, found).expand_as(found).clone(), **_of_value("replace", value, how))

    @classmethod
    def add(cls, site: str | Site, value: Tensor | float, **how: Any) -> Edit:
        return cls(site, lambda found: found + _like(value, found), **_of_value("add", value, how))

    @classmethod
    def scale(cls, site: str | Site, factor: float, **how: Any) -> Edit:
        """factor: 0.0 ablates to zero, also what is infinite or NaN."""
        change = lambda found: torch.zeros_like(found) if factor == 0 else found * factor  # noqa: E731
        return cls(site, change, **_of_value("scale", float(factor), how))

    @classmethod
    def project_out(cls, site: str | Site, direction: Tensor, **how: Any) -> Edit:
        """direction: [width] or [d_head]: what is changed has no part along it any more. Raises EditError for zeros."""
        direction = torch.as_tensor(direction)
        length = float(direction.double().norm())
        if not 0 < length < float("inf"):
            raise EditError(f"the direction to project out of {site} has the length {length}; it needs one.")

        def without(found: Tensor) -> Tensor:
            unit = (direction.double() / length).to(found.device, torch.float32)
            wide = found.float()
            return (wide - (wide * unit).sum(-1, keepdim=True) * unit).to(found.dtype)

        return cls(site, without, **_of_value("project_out", direction, how))


def _of_value(name: str, value: Tensor | float, how: dict[str, Any]) -> dict[str, Any]:
    """What an edit with a value has: name and value, and whether all positions have the same one."""
    own_axes = 1 if how.get("heads") is None else 2
    is_positionwise = not isinstance(value, Tensor) or value.dim() <= own_axes
    return {"name": name, "value": value, "is_positionwise": is_positionwise, **how}


def _like(value: Tensor | float, found: Tensor) -> Tensor:
    return torch.as_tensor(value).to(device=found.device, dtype=found.dtype)


@contextmanager
def editing(model: Any, edits: Edit | Iterable[Edit]) -> Iterator[None]:
    """Make edits in every forward inside the with; at one site they follow one another as they are listed.

    model: a transformers decoder, or a LoadedModel. Of nested withs the inner one's edits come first.
    Raises EditError for an edit that cannot be made, SiteUnavailable and UnknownSite for its site; and when a forward ends in which
    an edit was not made, also one of a part of the model, at the latest when the with ends.
    """
    model = model if isinstance(model, nn.Module) else _instance(model)
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    find_layout(model)  # as it is called: what wraps it may forbid it
    model = inner(model)
    layout = find_layout(model)
    made = [_Made(model, layout, edit) for edit in edits]
    forward = _Forward(made)
    by_position = any(edit.where is not None or not edit.is_positionwise for edit in edits)
    with alone_with(model), noted(model, layout, made, by_position=by_position), Hooks() as hooks:
        embedding = model.get_submodule(layout.embedding)
        hooks.before(model, forward.begins, prepend=True)
        hooks.before(embedding, forward.feed, prepend=True)
        for each in reversed(made):  # each goes before those that are there, capturing's among them
            each.install(hooks, forward)
        hooks.after(model, forward.ends)
        hooks.after(model, forward.leaves, always_call=True)
        yield
        forward.settle()


def _instance(model: Any) -> nn.Module:
    """The model of a LoadedModel. Raises EditError for what is none, such as a name."""
    found = getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise EditError(
            f"editing changes a model that is loaded, not {model!r}: write loaded = load_model(...), and pass loaded to editing and to what "
            "runs within it."
        )
    return found


class _Forward:
    """The current forward: which columns it feeds, and that every edit is made in it once.

    Begun by the model, or by its embedding alone, where people call a part of the model: then the columns are not known, and whether
    the edits were made is seen when the next one begins, or at the end.
    """

    def __init__(self, made: Sequence[_Made]) -> None:
        self._made = made
        self.first: int | None = None
        """The first column that it feeds, where that is known."""
        self.n = 0
        """The number of columns. 0 before ids were fed."""
        self._end = 0
        self._n_before: int | None = None
        self._is_whole = self._is_part = False
        self.keeps_some_logits = False

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The columns go on after those in the cache; without one they begin anew."""
        cache = cache_in(kwargs)
        if cache is None:
            self._n_before = 0
        else:
            self._n_before = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None
        self._starts(isinstance(kwargs.get("logits_to_keep"), Tensor))
        self._is_whole = True

    def feed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = input_of(args, kwargs)
        if ids is None or ids.dim() != 2:
            raise EditError(
                f"the embedding was given ids of shape {None if ids is None else tuple(ids.shape)}; expected two axes."
            )
        if self._is_whole:
            self.first = self._end if self._n_before is None else self._n_before
        else:
            self._starts(keeps_some_logits=False)
            self._is_part = True
        self.n = ids.shape[1]
        self._end = (self.first or 0) + self.n

    def _starts(self, keeps_some_logits: bool) -> None:
        self.settle()
        self.keeps_some_logits = keeps_some_logits
        self.first, self.n = None, 0
        for each in self._made:
            each.n_fired = 0

    def ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for each in self._made:
            if each.n_fired != 1:
                raise EditError(
                    f"the edit of {each.key} was made {each.n_fired} times in a forward; once was expected."
                )

    def leaves(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model's forward is over, or failed."""
        self._is_whole = False

    def settle(self) -> None:
        """A forward of a part of the model, if that was the last, is over."""
        if self._is_part:
            self._is_part = False
            for each in self._made:
                if each.n_fired != 1:
                    raise EditError(
                        f"the edit of {each.key} was made {each.n_fired} times when a part of the model was run by itself; once was "
                        "expected. Run the whole model."
                    )


class _Made:
    """One edit in one model."""

    def __init__(self, model: nn.Module, layout: Layout, edit: Edit) -> None:
        self.edit, self.n_fired = edit, 0
        site = site_of(edit.site)
        self.key = site.key
        reason = TABLE[site.kind].not_edited
        if reason is not None:
            raise EditError(f"{self.key} cannot be edited: {reason}.")
        self.tap: Tap = layout.pick([site])[site.key]
        self.module = model.get_submodule(self.tap.module)
        self.n_heads = layout.heads_of(site.kind)
        if edit.heads is not None and (isinstance(edit.heads, str | int) or not len(edit.heads)):
            raise EditError(
                f"heads of {self.key} are {edit.heads!r}; write a list of numbers, or leave it out for all."
            )
        for head in edit.heads if edit.heads is not None else ():
            if isinstance(head, bool) or not isinstance(head, int):
                raise EditError(f"{self.key} has no head {head!r}; write numbers.")
            if not self.n_heads:
                with_heads = ", ".join(name for name, row in TABLE.items() if row.heads and row.not_edited is None)
                raise EditError(f"{self.key} has no heads; these have: {with_heads}.")
            if not 0 <= head < self.n_heads:
                raise EditError(f"{self.key} has no head {head}: it has {self.n_heads}, 0 to {self.n_heads - 1}.")

    @property
    def described(self) -> str:
        """For the settings of runs: values are told apart by their digest."""
        edit, value = self.edit, self.edit.value
        name = edit.name if value is None else f"{edit.name} {value}"
        if isinstance(value, Tensor):
            digest = hashlib.blake2b(value.detach().cpu().double().numpy().tobytes(), digest_size=6).hexdigest()
            name = f"{edit.name} {list(value.shape)} {digest}"
        return f"{name} at {self.key}" + ("" if edit.heads is None else f" heads {edit.heads}")

    def install(self, hooks: Hooks, forward: _Forward) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = self._changed(input_of(args, kwargs), forward)
            if args:
                return (with_tensor(args[0], changed), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: with_tensor(kwargs[name], changed)}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return with_tensor(output, self._changed(tensor_of(output), forward))

        if self.tap.end == "input":
            hooks.before(self.module, before, prepend=True)
        else:
            hooks.after(self.module, after, prepend=True)

    def _changed(self, value: Tensor | None, forward: _Forward) -> Tensor:
        """What a module gives or is given, edited. value: [batch, columns, width], or its first two axes as one."""
        if value is None:
            raise EditError(f"the module of {self.key} ({self.tap.module}) gave no tensor.")
        self.n_fired += 1
        if not forward.n and (value.dim() == 2 or self.edit.where is not None):
            raise EditError(f"{self.key}: which columns are edited is not known in a forward that is fed no token ids.")
        whole = value.view(-1, forward.n, value.shape[-1]) if value.dim() == 2 else value
        if self.edit.where is None:
            changed = self.tap.put(whole, self._of(self.tap.take(whole)))
        elif forward.first is None:
            raise EditError(
                f"{self.key}: `where` is asked for columns, which are known when the whole model runs, and a part of it was run by itself."
            )
        else:
            kept = self.edit.where(forward.first, forward.n)
            changed = whole if kept is None or not len(kept.rows) else self._at(kept, whole, forward, forward.first)
        return changed.reshape(value.shape)

    def _at(self, kept: Kept, whole: Tensor, forward: _Forward, first: int) -> Tensor:
        if forward.keeps_some_logits and self.key == "logits":
            raise EditError(
                "logits_to_keep names columns, so that which logits are where is not known; leave it out, or `where`."
            )
        lacking = forward.n - whole.shape[1]  # logits are computed for the last columns only
        rows, column = kept.rows.to(whole.device), kept.columns.to(whole.device) - first - lacking
        if int(column.min()) < 0 or int(column.max()) >= whole.shape[1] or int(rows.max()) >= len(whole):
            raise EditError(
                f"{self.key} was not computed at all of the rows and columns to edit: there are {list(whole.shape[:2])}."
            )
        changed, some = whole.clone(), whole[rows, column]
        changed[rows, column] = self.tap.put(some, self._of(self.tap.take(some)))
        return changed

    def _of(self, found: Tensor) -> Tensor:
        """The values of a site, changed in the heads that are edited."""
        if self.edit.heads is None:
            return self._change(found)
        heads = torch.tensor(list(self.edit.heads), device=found.device)
        split = found.reshape(*found.shape[:-1], self.n_heads, -1)
        some = split.index_select(-2, heads)
        changed = split.clone()
        changed[..., heads, :] = self._change(some)
        return changed.flatten(-2)

    def _change(self, found: Tensor) -> Tensor:
        try:
            changed = self.edit.change(found)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:  # shapes that do not go together
            raise EditError(
                f"the edit of {self.key} failed on values of shape {list(found.shape)}: {failure}"
            ) from failure
        if not isinstance(changed, Tensor) or changed.shape != found.shape:
            gave = f"shape {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
            raise EditError(f"the edit of {self.key} gave values of {gave}; expected {list(found.shape)}.")
        return changed.to(device=found.device, dtype=found.dtype)

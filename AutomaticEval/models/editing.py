"""`editing`: change chosen sites of a model in every forward, whoever runs the model.

An edit changes what the next part of the model receives. `capturing`, whether it stands around the edit or within it, records what was
received.
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
    """Takes the values and returns new ones of the same shape, without changing in place what it was given. The shape is
    [batch, columns, width]; with `where` [n, width]. With `heads` the last axis is two: [..., n heads, d_head]."""

    heads: Sequence[int] | None = None
    """The heads of z or q, or the key-value heads of k or v, that are changed. None changes the whole width."""

    where: Keep | None = None
    """where(first column, number of columns) -> the (row, column) pairs of a forward that are changed. None changes all of them."""

    is_positionwise: bool = False
    """Whether the new values of a position depend on its own values alone. When they do not, or when there is a `where`, lm-eval's requests
    are run in lm-eval's own batches: computing once what requests share would make the edit in other rows and columns."""

    is_fixed: bool = False
    """Whether `change` is operations of tensors alone, the same in every forward: no number is read back, nothing is remembered. Only then can
    answers be generated from a graph, which does not call it again."""

    name: str = "change"
    """What the edit does, for the settings of runs that are made with it."""

    value: Tensor | float | None = None
    """What the edit is made with, for the settings of those runs."""

    @classmethod
    def replace(cls, site: str | Site, value: Tensor | float, **how: Any) -> Edit:
        """Put value, broadcast to the shape of what is changed, in its place. how: `heads`, `where`."""
        like = _moved(value)
        return cls(site, lambda old: like(old).expand_as(old).clone(), **_of_value("replace", value, how))

    @classmethod
    def add(cls, site: str | Site, value: Tensor | float, **how: Any) -> Edit:
        """Add value, broadcast to the shape of what is changed. how: `heads`, `where`."""
        like = _moved(value)
        return cls(site, lambda old: old + like(old), **_of_value("add", value, how))

    @classmethod
    def scale(cls, site: str | Site, factor: float, **how: Any) -> Edit:
        """Multiply by factor; 0.0 gives zeros, also where a value is infinite or NaN. how: `heads`, `where`."""

        def scaled(old: Tensor) -> Tensor:
            return torch.zeros_like(old) if factor == 0 else old * factor

        return cls(site, scaled, **_of_value("scale", float(factor), how))

    @classmethod
    def project_out(cls, site: str | Site, direction: Tensor, **how: Any) -> Edit:
        """Take away the part along a direction, [width] or, with heads, [d_head]. how: `heads`, `where`.

        Raises EditError for a direction of length zero, or of no finite length.
        """
        direction = torch.as_tensor(direction)
        length = float(direction.double().norm())
        if not 0 < length < float("inf"):
            raise EditError(f"the direction to project out of {site} has the length {length}; it needs one.")

        of_length_1 = _moved((direction.double() / length).float())

        def without(old: Tensor) -> Tensor:
            wide = old.float()
            unit = of_length_1(wide)
            return (wide - (wide * unit).sum(-1, keepdim=True) * unit).to(old.dtype)

        return cls(site, without, **_of_value("project_out", direction, how))


def _of_value(name: str, value: Tensor | float, how: dict[str, Any]) -> dict[str, Any]:
    """The fields of an edit that is made with a value. It is positionwise when the value is the same at all positions."""
    own_axes = 1 if how.get("heads") is None else 2
    is_positionwise = not isinstance(value, Tensor) or value.dim() <= own_axes
    return {"name": name, "value": value, "is_positionwise": is_positionwise, "is_fixed": True, **how}


def _moved(value: Tensor | float) -> Callable[[Tensor], Tensor]:
    """Gives a value on the device and in the dtype of a tensor.

    It is copied to a device once, and again when it was changed in place: each copy waits for the device, and no graph can record one.
    """
    copies: dict[tuple[torch.device, torch.dtype], tuple[int, Tensor]] = {}

    def like(old: Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.device == old.device:
            return value.to(old.dtype)
        version = 0 if not isinstance(value, Tensor) or value.is_inference() else value._version
        place = (old.device, old.dtype)
        if place not in copies or copies[place][0] != version:
            copies[place] = (version, torch.as_tensor(value).to(device=old.device, dtype=old.dtype))
        return copies[place][1]

    return like


@contextmanager
def editing(model: Any, edits: Edit | Iterable[Edit]) -> Iterator[None]:
    """Make edits in every forward inside the with.

    model: a transformers decoder, or a LoadedModel. Edits of one site are made in the order of the list. When withs are nested, the edits
    of the inner one are made first.
    Raises UnknownSite and SiteUnavailable for the site of an edit, and EditError for an edit that cannot be made. Raises EditError, too, when
    a forward ends in which an edit was not made. When only a part of the model is run, that is raised at the latest when the with ends.
    """
    model = model if isinstance(model, nn.Module) else _instance(model)
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    find_layout(model)  # refuses a model whose wrapper cannot be captured
    model = inner(model)
    layout = find_layout(model)
    made = [_Made(model, layout, edit) for edit in edits]
    forward = _Forward(made)
    by_position = any(edit.where is not None or not edit.is_positionwise for edit in edits)
    with alone_with(model), noted(model, layout, made, by_position=by_position), Hooks() as hooks:
        embedding = model.get_submodule(layout.embedding)
        hooks.before(model, forward.begins, prepend=True)
        hooks.before(embedding, forward.feed, prepend=True)
        for each in reversed(made):  # each hook is put before the hooks that are there already, capturing's among them
            each.install(hooks, forward)
        hooks.after(model, forward.ends)
        hooks.after(model, forward.leaves, always_call=True)
        yield
        forward.settle()


def _instance(model: Any) -> nn.Module:
    """The model of a LoadedModel. Raises EditError for anything else, such as a name."""
    instance = getattr(model, "model", None)
    if not isinstance(instance, nn.Module):
        raise EditError(
            f"editing changes a model that is loaded, not {model!r}: write loaded = load_model(...), and pass loaded to editing and to what "
            "runs within it."
        )
    return instance


class _Forward:
    """The current forward: which columns it feeds, and whether every edit is made in it once.

    A forward begins when the model is called. When only a part of the model is called, it begins at the embedding: then the columns are not
    known, and the edits are counted when the next forward begins, or when the with ends.
    """

    def __init__(self, made: Sequence[_Made]) -> None:
        self._made = made
        self.first: int | None = None
        """The first column that it feeds. None when that is not known."""
        self.n = 0
        """The number of columns that it feeds; 0 until ids are fed."""
        self._end = 0
        self._needs_columns = any(each.edit.where is not None for each in made)
        self._n_before: int | None = None
        self._is_whole = self._is_part = False
        self.keeps_some_logits = False

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called. Its columns come after those in the cache; without a cache they begin at 0."""
        cache = cache_in(kwargs)
        if cache is None:
            self._n_before = 0
        elif self._needs_columns and hasattr(cache, "get_seq_length"):
            self._n_before = int(cache.get_seq_length())  # of a static cache this waits for the device
        else:
            self._n_before = None
        self._starts(isinstance(kwargs.get("logits_to_keep"), Tensor))
        self._is_whole = True

    def feed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The embedding is called with token ids [batch, columns]."""
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
        """The model has computed its output. Raises EditError when an edit was not made once."""
        for each in self._made:
            if each.n_fired != 1:
                raise EditError(
                    f"the edit of {each.key} was made {each.n_fired} times in a forward; once was expected."
                )

    def leaves(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model's forward is over, whether it ended or failed."""
        self._is_whole = False

    def settle(self) -> None:
        """The last forward is over, if it was one of a part of the model. Raises EditError when an edit was not made once in it."""
        if self._is_part:
            self._is_part = False
            for each in self._made:
                if each.n_fired != 1:
                    raise EditError(
                        f"the edit of {each.key} was made {each.n_fired} times when a part of the model was run by itself; once was "
                        "expected. Run the whole model."
                    )


class _Made:
    """One edit in one model: it finds the module to hook, and changes what passes there."""

    def __init__(self, model: nn.Module, layout: Layout, edit: Edit) -> None:
        self.edit = edit
        self.n_fired = 0
        """How often the edit was made in the current forward."""
        site = site_of(edit.site)
        self.key = site.key
        reason = TABLE[site.kind].not_edited
        if reason is not None:
            raise EditError(f"{self.key} cannot be edited: {reason}.")
        self.tap: Tap = layout.pick([site])[site.key]
        self.module = model.get_submodule(self.tap.module)
        self.n_heads = layout.heads_of(site.kind)
        self._check_heads(edit.heads)
        self._heads: dict[torch.device, Tensor] = {}
        """The heads that are changed, as a tensor on each device."""

    def _check_heads(self, heads: Any) -> None:
        """Raises EditError for heads that are no list of numbers, or that the site does not have."""
        if heads is None:
            return
        if isinstance(heads, str | int) or not len(heads):
            raise EditError(f"heads of {self.key} are {heads!r}; write a list of numbers, or leave it out for all.")
        for head in heads:
            if isinstance(head, bool) or not isinstance(head, int):
                raise EditError(f"{self.key} has no head {head!r}; write numbers.")
            if not self.n_heads:
                with_heads = ", ".join(name for name, row in TABLE.items() if row.heads and row.not_edited is None)
                raise EditError(f"{self.key} has no heads; these have: {with_heads}.")
            if not 0 <= head < self.n_heads:
                raise EditError(f"{self.key} has no head {head}: it has {self.n_heads}, 0 to {self.n_heads - 1}.")

    @property
    def described(self) -> str:
        """The edit in words, for the settings of runs. A tensor is named by its shape and the digest of its numbers."""
        edit, value = self.edit, self.edit.value
        name = edit.name if value is None else f"{edit.name} {value}"
        if isinstance(value, Tensor):
            digest = hashlib.blake2b(value.detach().cpu().double().numpy().tobytes(), digest_size=6).hexdigest()
            name = f"{edit.name} {list(value.shape)} {digest}"
        return f"{name} at {self.key}" + ("" if edit.heads is None else f" heads {edit.heads}")

    def install(self, hooks: Hooks, forward: _Forward) -> None:
        """Hook the module, so that the edit is made in every forward."""

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
        """The value that a module gives or is given, with the edit made. value: [batch, columns, width], or [batch * columns, width]."""
        if value is None:
            raise EditError(f"the module of {self.key} ({self.tap.module}) gave no tensor.")
        self.n_fired += 1
        if not forward.n and (value.dim() == 2 or self.edit.where is not None):
            raise EditError(f"{self.key}: which columns are edited is not known in a forward that is fed no token ids.")
        whole = value.view(-1, forward.n, value.shape[-1]) if value.dim() == 2 else value
        if self.edit.where is None:
            changed = self._edited(whole)
        elif forward.first is None:
            raise EditError(
                f"{self.key}: `where` needs the numbers of the columns. They are not known when a part of the model is run by itself."
            )
        else:
            kept = self.edit.where(forward.first, forward.n)
            changed = whole if kept is None or not len(kept.rows) else self._edited_at(kept, whole, forward)
        return changed.reshape(value.shape)

    def _edited_at(self, kept: Kept, whole: Tensor, forward: _Forward) -> Tensor:
        """The value with the edit made at some (row, column) pairs. whole: [batch, columns, width]."""
        if forward.keeps_some_logits and self.key == "logits":
            raise EditError(
                "logits_to_keep names columns, so that it is not known which logits are where; leave it out, or `where`."
            )
        lacking = forward.n - whole.shape[1]  # logits are computed for the last columns only
        rows, columns = kept.rows.to(whole.device), kept.columns.to(whole.device) - (forward.first or 0) - lacking
        if int(columns.min()) < 0 or int(columns.max()) >= whole.shape[1] or int(rows.max()) >= len(whole):
            raise EditError(
                f"{self.key} was not computed at all of the rows and columns to edit: there are {list(whole.shape[:2])}."
            )
        changed = whole.clone()
        changed[rows, columns] = self._edited(whole[rows, columns])
        return changed

    def _edited(self, value: Tensor) -> Tensor:
        """value: [..., width of the module]."""
        return self.tap.put(value, self._in_heads(self.tap.take(value)))

    def _in_heads(self, values: Tensor) -> Tensor:
        """The values of a site, [..., width], changed in the heads that the edit names, or in all of the width."""
        if self.edit.heads is None:
            return self._change(values)
        if values.device not in self._heads:
            self._heads[values.device] = torch.tensor(list(self.edit.heads), device=values.device)
        heads = self._heads[values.device]
        changed = values.reshape(*values.shape[:-1], self.n_heads, -1).clone()
        changed[..., heads, :] = self._change(changed.index_select(-2, heads))
        return changed.flatten(-2)

    def _change(self, old: Tensor) -> Tensor:
        """What the edit's function makes of the values. Raises EditError when it fails, or gives another shape."""
        try:
            new = self.edit.change(old)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:  # shapes that do not go together
            raise EditError(
                f"the edit of {self.key} failed on values of shape {list(old.shape)}: {failure}"
            ) from failure
        if not isinstance(new, Tensor) or new.shape != old.shape:
            gave = f"shape {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise EditError(f"the edit of {self.key} gave values of {gave}; expected {list(old.shape)}.")
        return new.to(device=old.device, dtype=old.dtype)

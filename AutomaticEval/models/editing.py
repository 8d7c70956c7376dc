"""`editing`: change chosen sites of a model in every forward, whoever runs the model.

An edit changes what the next part of the model receives. `capturing`, whether it stands around the edit or within it, records what was
received.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from AutomaticEval.errors import EditError
from AutomaticEval.models.architecture.added_outputs import AddedOutputs
from AutomaticEval.models.architecture.forward_call import (
    alone_with,
    cache_in,
    cache_name,
    input_of,
    tensor_of,
    with_tensor,
)
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.checkpoint.load_options import LoadKeywords
from AutomaticEval.models.described.plain_module import refuse_plain
from AutomaticEval.models.edit import DROP_EXPERTS, ONLY_EXPERTS, ROUTER, Edit
from AutomaticEval.models.edited_models import noted
from AutomaticEval.models.edited_positions import Sequences
from AutomaticEval.models.experts.rerouting import refuse_barred, rerouted
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.loading import load_model, refuse_unknown
from AutomaticEval.models.recording import Kept
from AutomaticEval.models.refused.unsuited import refuse_virtual
from AutomaticEval.selection import Positions
from AutomaticEval.sites import TABLE, Site, site_of

WITH_VALUE = ("replace", "add", "project_out")
"""The edits that are made with a value in the site's own units."""


def editing(model: Any, edits: Edit | Iterable[Edit], **load: Unpack[LoadKeywords]) -> AbstractContextManager[Any]:
    """Make edits in every forward inside the with, and give the model that is edited, which every function takes.

    model: a name, a folder, "demo", a LoadedModel, or a transformers decoder. load: how a name is loaded, as in `load_model`. Edits of one site are made
    in the order of the list. When withs are nested, the edits of the inner one are made first.
    Raises UnknownSite and SiteUnavailable for the site of an edit, and EditError for an edit that cannot be made. Raises EditError, too, when
    a forward ends in which an edit was not made. When only a part of the model is run, that is raised at the latest when the with ends.
    TypeError for an unknown option.
    """
    refuse_unknown(load)
    return _editing(model, edits, load)


@contextmanager
def _editing(model: Any, edits: Edit | Iterable[Edit], load: LoadKeywords) -> Iterator[Any]:
    """`editing`, once its options are known to be there."""
    edited = load_model(model, **load) if isinstance(model, str | Path) or load else model
    whole = edited if isinstance(edited, nn.Module) else _instance(edited)
    refuse_virtual(whole, "editing")
    find_layout(whole)  # refuses a model whose wrapper cannot be captured
    whole = inner(whole)
    layout = find_layout(whole)
    given = _edits_of(edits)
    edits = [each for edit in given for each in edit.in_layers(layout.n_layers)]
    made = [_Made(whole, layout, edit) for edit in edits]
    forward = _Forward(whole, made)
    by_position = any(edit.is_by_position for edit in edits)
    if any(edit.positions is not None for edit in edits):
        refuse_plain(whole, "edits with positions are told apart by masks of transformers")
        _refuse_positions(whole)
    with alone_with(whole), noted(whole, layout, made, by_position=by_position), Hooks() as hooks:
        embedding = whole.get_submodule(layout.embedding)
        hooks.before(whole, forward.begins, prepend=True)
        hooks.before(embedding, forward.feed, prepend=True)
        for each in reversed(made):  # each hook is put before the hooks that are there already, capturing's among them
            each.install(hooks, whole, forward)
        hooks.after(whole, forward.ends)
        hooks.after(whole, forward.leaves, always_call=True)
        yield edited
        forward.settle()


def _edits_of(edits: Any) -> list[Edit]:
    """One edit, or several, as a list. Raises EditError for anything else."""
    given = [edits] if isinstance(edits, Edit) or not isinstance(edits, Iterable) else list(edits)
    for each in given:
        if not isinstance(each, Edit):
            instead = (
                "a direction is added by direction.edit(4)"
                if hasattr(each, "edit")
                else "an edit is made by Edit.add, Edit.scale, …"
            )
            raise EditError(f"editing takes edits, and found {type(each).__name__}: {instead}.")
    return given


def _instance(model: Any) -> nn.Module:
    """The model of a LoadedModel. Raises EditError for anything else."""
    instance = getattr(model, "model", None)
    if not isinstance(instance, nn.Module):
        raise EditError(
            f"editing changes a model: a name, a folder, what load_model gives, or a transformers model; found {type(model).__name__}."
        )
    return instance


class _Forward:
    """The current forward: which columns it feeds, and whether every edit is made in it once.

    A forward begins when the model is called. When only a part of the model is called, it begins at the embedding: then the columns are not
    known, and the edits are counted when the next forward begins, or when the with ends.
    """

    def __init__(self, model: nn.Module, made: Sequence[_Made]) -> None:
        self._made = made
        self.sequences = Sequences(model)
        self.first: int | None = None
        """The first column that it feeds. None when that is not known."""
        self.n = 0
        """The number of columns that it feeds; 0 until ids are fed."""
        self._end = 0
        self._needs_sequences = any(each.edit.positions is not None for each in made)
        self._needs_columns = self._needs_sequences or any(each.edit.where is not None for each in made)
        self._mask: Any = None
        self._n_before: int | None = None
        self._is_whole = self._is_part = False
        self.keeps_some_logits = False

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called. Its columns come after those in the cache; without a cache they begin at 0."""
        cache = cache_in(kwargs)
        self._mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if cache is None:
            self._n_before = 0
        elif self._needs_columns and hasattr(cache, "get_seq_length"):
            self._n_before = _length_of(cache)
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
        if self._needs_sequences and self.first == 0:
            self.sequences.begin(ids, self._mask)
        elif self._needs_sequences:
            self.sequences.go_on(self.n)

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


def _length_of(cache: Any) -> int:
    """How many columns are in a cache. Raises EditError for a cache that does not know it."""
    try:
        return int(cache.get_seq_length())  # of a static cache this waits for the device
    except ValueError as unknown:
        raise EditError(f"the columns of a forward are not known, which the edit needs: {unknown}") from unknown


def _refuse_positions(model: Any) -> None:
    """Raises EditError for a model whose forwards do not say how many tokens came before: each would begin a sequence."""
    kinds = [str(kind) for kind in getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()]
    first = next(iter(kinds), "attention")
    if (
        cache_name(model) is None
        or getattr(model, "_is_stateful", False)
        or "attention" not in first
        or "linear" in first
    ):
        raise EditError(
            f"positions cannot be given for {type(model).__name__}: what it keeps of earlier tokens does not say how many there were, so a decode step "
            "would be taken for a prompt. Give `where`, or leave positions out."
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
        self.is_router = site.kind == ROUTER
        self.tap: Tap = layout.pick([site])[site.key]
        self.module = model.get_submodule(self.tap.module)
        if self.tap.then is not None:
            raise EditError(
                f"{self.key} cannot be edited in this model, which computes keys and values anew, of latents, in every forward; edit z instead."
            )
        self.n_heads = layout.heads_at(site)
        self.n_active = layout.widths.get(Site("expert_ids", site.layer), 1)
        self._check_heads(edit.heads)
        self._check_experts(edit, layout.widths[site])
        self._check_width(layout.widths[site], TABLE[site.kind].width)
        self._width = layout.widths[site]
        self._chosen: dict[torch.device, Tensor] = {}
        """The heads or experts that are changed, as a tensor on each device."""

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

    def _check_experts(self, edit: Edit, n_experts: int) -> None:
        """Raises EditError for experts of a site without any, for experts that a layer does not have, and when too few would be left."""
        if edit.experts is None:
            return
        if not self.is_router:
            raise EditError(f"experts were given for {self.key}; they are those of router_logits.")
        for expert in edit.experts:
            if not 0 <= expert < n_experts:
                raise EditError(f"{self.key} has no expert {expert}: it has {n_experts}, 0 to {n_experts - 1}.")
        n_left = {DROP_EXPERTS: n_experts - len(edit.experts), ONLY_EXPERTS: len(edit.experts)}.get(
            edit.name, n_experts
        )
        if n_left < self.n_active:
            raise EditError(
                f"{edit.name} at {self.key} would leave {n_left} of {n_experts} experts, and each token has {self.n_active}; leave as many at least."
            )

    def _check_width(self, width: int, sizes: Sequence[str]) -> None:
        """Raises EditError for a value of another width than the site has. sizes: those whose product the width is, such as d_model."""
        value, heads = self.edit.value, self.edit.heads
        if self.edit.name not in WITH_VALUE or not isinstance(value, Tensor) or not value.dim():
            return
        expected, size = (width, " * ".join(sizes)) if heads is None else (width // self.n_heads, "d_head")
        if self.edit.experts is not None:
            expected, size = len(self.edit.experts), "experts named"
        one = () if self.edit.name == "project_out" else (1,)  # which is broadcast
        fits = value.shape[-1] in (expected, *one) and (
            heads is None or value.dim() < 2 or value.shape[-2] in (len(heads), 1)
        )
        if not fits:
            some = "" if heads is None else f" of {len(heads)} heads"
            raise EditError(
                f"Edit.{self.edit.name} at {self.key} was given a value of shape {list(value.shape)}; expected [{expected}]{some}, the {size} of "
                "this model. Take a vector of this model, at this site."
            )

    @property
    def described(self) -> str:
        """The edit in words, for the settings of runs. A tensor is named by its shape and the digest of its numbers."""
        edit, value = self.edit, self.edit.value
        name = edit.name if value is None else f"{edit.name} {value}"
        if isinstance(value, Tensor):
            name = f"{edit.name} {list(value.shape)} {_digest(value)}"
        heads = "" if edit.heads is None else f" heads {edit.heads}"
        heads += "" if edit.experts is None else f" experts {list(edit.experts)}"
        return f"{name} at {self.key}{heads}" + ("" if edit.positions is None else f" positions {edit.positions}")

    @property
    def values(self) -> dict[str, Tensor]:
        """`edits/<digest>` -> the tensor that the edit is made with, [n, width], float64, for files. Nothing when it differs by position."""
        value = self.edit.value
        if not isinstance(value, Tensor) or not 1 <= value.dim() <= 2:
            return {}
        return {f"edits/{_digest(value)}": value.detach().cpu().double().reshape(-1, value.shape[-1])}

    def install(self, hooks: Hooks, model: nn.Module, forward: _Forward) -> None:
        """Hook the module, so that the edit is made in every forward. Of a sum, the last module hands on all of it."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = self._changed(input_of(args, kwargs), forward)
            if args:
                return (with_tensor(args[0], changed), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: with_tensor(kwargs[name], changed)}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return with_tensor(output, self._changed(added.with_last(tensor_of(output)), forward))

        def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = tensor_of(output, self.tap.elements)  # as edits of the same router have left them
            used: list[Tensor] = []

            def change(logits: Tensor) -> Tensor:
                used.append(self._changed(None if before is None else before.to(logits.dtype).view_as(logits), forward))
                return used[-1]

            output = rerouted(module, args, kwargs, self._width, change)
            refuse_barred(output, used[-1])
            return output

        if self.is_router:  # what it gives depends on its logits within it
            hooks.after(self.module, routed, prepend=True, with_kwargs=True)
        elif self.tap.end == "input":
            hooks.before(self.module, before, prepend=True)
        else:
            added = AddedOutputs(hooks, model, self.tap, moves=True)
            hooks.after(self.module, after, prepend=True)

    def _changed(self, given: Tensor | None, forward: _Forward) -> Tensor:
        """The value that a module gives or is given, with the edit made in the stream that the site is."""
        if given is None:
            raise EditError(f"the module of {self.key} ({self.tap.module}) gave no tensor.")
        self.n_fired += 1
        return self.tap.with_stream(given, self._changed_stream(self.tap.stream_of(given), forward))

    def _changed_stream(self, given: Tensor, forward: _Forward) -> Tensor:
        """One stream with the edit made. given: [batch, columns, width], or [batch * columns, width]."""
        value = self.tap.joined(given)
        is_everywhere = self.edit.where is None and self.edit.positions is None
        if not forward.n and (value.dim() == 2 or not is_everywhere):
            raise EditError(f"{self.key}: which columns are edited is not known in a forward that is fed no token ids.")
        whole = value.view(-1, forward.n, value.shape[-1]) if value.dim() == 2 else value
        if is_everywhere:
            return self._edited(whole).reshape(given.shape)
        kept = self._places(forward)
        changed = whole if kept is None or not len(kept.rows) else self._edited_at(kept, whole, forward)
        return changed.reshape(given.shape)

    def _places(self, forward: _Forward) -> Kept | None:
        """The rows and columns of the current forward that are edited; None for none. Raises EditError when they are not known."""
        if forward.first is None:
            raise EditError(
                f"{self.key}: `where` and `positions` need the numbers of the columns. They are not known when a part of the model is run by itself."
            )
        if isinstance(self.edit.positions, Positions):
            return forward.sequences.at(self.edit.positions, forward.first, forward.n)
        return None if self.edit.where is None else self.edit.where(forward.first, forward.n)

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
        """The values of a site, [..., width], changed in the heads or experts that the edit names, or in all of the width."""
        if self.edit.experts is not None and self.edit.name != ONLY_EXPERTS:
            experts = self._on(values.device, self.edit.experts)
            changed = values.clone()
            changed[..., experts] = self._change(values.index_select(-1, experts))
            return changed
        if self.edit.heads is None:
            return self._change(values)
        heads = self._on(values.device, self.edit.heads)
        changed = values.reshape(*values.shape[:-1], self.n_heads, -1).clone()
        changed[..., heads, :] = self._change(changed.index_select(-2, heads))
        return changed.flatten(-2)

    def _on(self, device: torch.device, numbers: Sequence[int]) -> Tensor:
        if device not in self._chosen:
            self._chosen[device] = torch.tensor(list(numbers), device=device)
        return self._chosen[device]

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


def _digest(value: Tensor) -> str:
    """Twelve hexadecimal digits that name a tensor's numbers."""
    return hashlib.blake2b(value.detach().cpu().double().numpy().tobytes(), digest_size=6).hexdigest()

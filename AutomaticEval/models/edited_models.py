"""Remembers which models are being edited now, and by which edits.

Others ask here before they look at a model with a small forward, or share a result among requests: an edit would change both.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from AutomaticEval.models.architecture.inner_model import inner


class Active(NamedTuple):
    """The edits of one `editing` that has not ended."""

    layout: Any
    """The layout of the inner model, found before the edits."""
    edits: Sequence[Any]
    """Each has `described`, a text that may take time to make, and `values`, the tensors that files keep of it."""
    by_position: bool
    """Whether an edit depends on rows or columns, and not on each position's own values alone."""


_active: weakref.WeakKeyDictionary[nn.Module, dict[object, Active]] = weakref.WeakKeyDictionary()
"""Inner model -> its edits; those of the outermost `editing` first."""


@contextmanager
def noted(model: nn.Module, layout: Any, edits: Sequence[Any], *, by_position: bool) -> Iterator[None]:
    """Remember the edits of a model until the with ends."""
    own = _active.setdefault(inner(model), {})
    key = object()
    try:
        own[key] = Active(layout, edits, by_position)  # within the try, so that no interrupt leaves it there
        yield
    finally:
        own.pop(key, None)  # one call, which no interrupt divides


def layout_of(model: nn.Module) -> Any:
    """The layout of the inner model of a model that is being edited; None for a model without edits."""
    own = _active.get(inner(model))
    return next(iter(own.values())).layout if own else None


def names_of(model: nn.Module) -> list[str]:
    """The edits of a model in words, the outermost first, for the settings of runs."""
    return [edit.described for edit in active_edits(model)]


def values_of(model: nn.Module) -> dict[str, Any]:
    """The tensors that a model is edited with, for files: `edits/<digest>` -> [n, width], float64."""
    return {name: value for edit in active_edits(model) for name, value in edit.values.items()}


def active_edits(model: nn.Module) -> list[Any]:
    """The edits of a model, the outermost first; each has `edit`, and the `key` of its site."""
    return [edit for each in _active.get(inner(model), {}).values() for edit in each.edits]


def depends_on_batch(model: nn.Module) -> bool:
    """Whether a model is being edited in a way that depends on rows or columns of a batch, and not on each sequence alone."""
    edits = [each.edit for each in active_edits(model)]
    return any(edit.is_by_position and edit.positions is None for edit in edits)


def depends_on_position(model: nn.Module) -> bool:
    """Whether a model is being edited in a way that depends on rows or columns."""
    return any(each.by_position for each in _active.get(inner(model), {}).values())

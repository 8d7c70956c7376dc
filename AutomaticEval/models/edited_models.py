"""Remembers which models are being edited, and by which edits.

Others ask before they probe a model, or share a result that an edit would change.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from AutomaticEval.models.architecture.inner_model import inner


class Active(NamedTuple):
    """The edits of one `editing`."""

    layout: Any
    """The inner model's layout, which was found before the edits."""
    edits: Sequence[Any]
    """Each with `described`, a text, which may take time to tell."""
    by_position: bool
    """Whether some depend on rows or columns, and not on a position's own values alone."""


_active: weakref.WeakKeyDictionary[nn.Module, dict[object, Active]] = weakref.WeakKeyDictionary()
"""Model -> its edits, outermost first."""


@contextmanager
def noted(model: nn.Module, layout: Any, edits: Sequence[Any], *, by_position: bool) -> Iterator[None]:
    """While the edits are made."""
    own = _active.setdefault(inner(model), {})
    key = object()
    try:
        own[key] = Active(layout, edits, by_position)  # inside, lest an interrupt leaves it there
        yield
    finally:
        own.pop(key, None)  # one call, which no interrupt divides


def layout_of(model: nn.Module) -> Any:
    """The layout of a model that is being edited, as its inner model has it; None for others."""
    own = _active.get(inner(model))
    return next(iter(own.values())).layout if own else None


def names_of(model: nn.Module) -> list[str]:
    """What is edited, outermost first; for the settings of runs."""
    return [edit.described for each in _active.get(inner(model), {}).values() for edit in each.edits]


def depends_on_position(model: nn.Module) -> bool:
    return any(each.by_position for each in _active.get(inner(model), {}).values())

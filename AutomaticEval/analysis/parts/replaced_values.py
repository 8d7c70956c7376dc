"""An edit that puts other values into chosen rows and columns of a forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from AutomaticEval.models.edit import Edit
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site

Choose = Callable[[int, int], tuple[Kept, Tensor]]
"""(first column of a forward, number of its columns) -> which rows and columns are replaced, and by which values: [n, width], or
[n, n chosen heads, d_head]."""


def replaced_values(site: Site, heads: Sequence[int] | None, choose: Choose) -> Edit:
    """An edit that replaces what `choose` names, in every forward."""
    replacement = _Replacement(choose)
    return Edit(site, replacement.values, heads, replacement.where)


class _Replacement:
    """The two functions of an edit that replaces values. `editing` calls `where` in each forward, and `values` after it."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._chosen: Tensor | None = None

    def where(self, first: int, n_columns: int) -> Kept:
        kept, self._chosen = self._choose(first, n_columns)
        return kept

    def values(self, before: Tensor) -> Tensor:
        assert self._chosen is not None, "where is called before"
        return self._chosen.to(before.device, before.dtype)

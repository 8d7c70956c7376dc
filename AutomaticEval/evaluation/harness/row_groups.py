"""`RowGroups`: which rows of lm-eval's batches are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from AutomaticEval.capture.batch_independence import Company, Span, apart, rope_limit
from AutomaticEval.errors import warn


class RowGroups:
    """Splits batches into groups of rows that change nothing of one another.

    keeps_batches: leave lm-eval's own batches whole, and only warn that their rows change one another.
    """

    def __init__(self, model: Any, *, keeps_batches: bool) -> None:
        self._model, self._keeps_batches = model, keeps_batches
        self._warned: set[str] = set()

    def of(self, spans: Sequence[Span], company: Company = Company()) -> list[list[int]]:
        """The numbers of a batch's rows, by group. spans: how long each row is. company: which rows may stand beside each other."""
        groups = apart(self._model, spans, company)
        if len(groups) == 1:
            return groups
        why = company.why or f"beyond {rope_limit(self._model)} tokens positions depend on the longest row of a batch"
        if self._keeps_batches:
            self._warn(f"Rows of a batch change one another, as in lm-eval's own batches: {why}.")
            return [list(range(len(spans)))]
        self._warn(f"Rows are computed apart from others of their batch: {why}.")
        return groups

    def _warn(self, line: str) -> None:
        """Warn, each line once."""
        if line not in self._warned:
            self._warned.add(line)
            warn(line)

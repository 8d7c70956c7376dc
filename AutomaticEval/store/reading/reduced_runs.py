"""What a run's rows are when they were reduced, and the refusal of such a run where whole rows are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from AutomaticEval.errors import SelectionError
from AutomaticEval.reducing.table import REDUCTIONS


def how_reduced(settings: Mapping[str, Any]) -> str:
    """What a row or line of a run holds, in words. settings: the run's."""
    name = settings.get("reduce")
    if name is None:
        return "whole rows"
    return REDUCTIONS[name].meaning if name in REDUCTIONS else f"rows that were reduced by {name!r}"


def refuse_reduced(settings: Mapping[str, Any], needed_by: str) -> None:
    """Raises SelectionError for a run whose rows were reduced. needed_by: what needs whole rows, as the message begins."""
    if settings.get("reduce") is not None:
        raise SelectionError(
            f"{needed_by} needs whole rows, and this run holds {how_reduced(settings)} (reduce={settings['reduce']}); capture it without reducing."
        )

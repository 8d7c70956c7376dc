"""What an analysis gives: estimates, and results that are written as JSON and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean, and how sure it is."""

    mean: float | None
    """None when there are no values."""

    interval: tuple[float, float] | None
    """The 95 % bootstrap interval of the mean, low and high. None for fewer than two values."""

    n: int
    """How many values the mean is taken over."""


@dataclass(frozen=True)
class Result:
    """What one analysis measured. Commands write `as_json()` to a file and draw it with `report.figures`.

    >>> result = recovered(loaded, pairs, {3: [5]})
    >>> result.measured["summary"]["denoising"].mean
    """

    kind: str
    """strength, comparison, screening, ablation, patching, pairs, sweep, steering or runs. The kind decides which figures are drawn."""

    measured: Mapping[str, Any]
    """Name -> what was measured, in the order of the file: estimates, numbers and texts, and lists and mappings of these."""

    settings: Mapping[str, Any] | None = None
    """What the result was made with. None for strength and comparison, whose files have no settings."""

    def as_json(self) -> dict[str, Any]:
        """kind, settings, and each name of `measured`, as dicts and lists. NaN and infinity stay; `write_json` makes them null."""
        settings = {} if self.settings is None else {"settings": _plain(self.settings)}
        return {"kind": self.kind, **settings, **_plain(self.measured)}


def _plain(value: Any) -> Any:
    """The value with a dict for each dataclass and mapping in it, and a list for each list and tuple."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value

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
    """The 95 % interval of the mean, low and high. None for fewer than five values."""

    n: int
    """How many values the mean is taken over."""

    simultaneous: tuple[float, float] | None = None
    """The interval at the level of all estimates that were made together. None for one that was made alone."""

    reason: str | None = None
    """Why there is no interval, or no mean. None when both are there."""


@dataclass(frozen=True)
class Effect(Estimate):
    """The mean of changes of the same prompts, how large it is beside their spread, and how often chance alone gives as much."""

    d: float | None = None
    """The mean in standard deviations of the changes (Cohen's d of pairs). None where all changes are one number."""

    p: float | None = None
    """The p value by signs, corrected for all effects that were measured together."""


@dataclass(frozen=True)
class Part(Effect):
    """Which part of a difference comes with something: the sum of what was moved, divided by the sum of the differences. d and p are of what was moved."""

    n_left_out: int = 0
    """Pairs whose difference is too small to carry meaning."""


@dataclass(frozen=True)
class Result:
    """What one analysis measured. Commands write `as_json()` to a file and draw it with `report.figures`.

    >>> result = recovered(loaded, pairs, {3: [5]})
    >>> result.measured["summary"]["denoising"].mean
    """

    kind: str
    """strength, comparison, screening, ablation, patching, pairs, sweep, steering, runs, probe, lens, lens_question, tuned_lens, geometry or experts. The kind decides which figures are drawn."""

    measured: Mapping[str, Any]
    """Name -> what was measured, in the order of the file: estimates, numbers and texts, and lists and mappings of these."""

    settings: Mapping[str, Any] | None = None
    """What the result was made with: commands give those of `made_with.AnalysisSettings`. None when it is not known."""

    methods: Mapping[str, Any] | None = None
    """How intervals and p values were made, and for how many comparisons they are corrected. None for a result without any."""

    def as_json(self) -> dict[str, Any]:
        """kind, settings, methods, and each name of `measured`, as dicts and lists. NaN and infinity stay; `write_json` makes them null."""
        about = {"settings": self.settings, "methods": self.methods}
        given = {name: _plain(value) for name, value in about.items() if value is not None}
        return {"kind": self.kind, **given, **_plain(self.measured)}


def _plain(value: Any) -> Any:
    """The value with a dict for each dataclass and mapping in it, and a list for each list and tuple."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value

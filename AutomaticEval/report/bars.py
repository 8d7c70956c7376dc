"""Bars with intervals: numbers before and after an intervention, and the heads with the largest numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from AutomaticEval.report.labels import label, save

COLOURS = {"before": "#4c72b0", "after": "#dd8452", "change": "#55a868"}
SIGNS = ("#c44e52", "#4c72b0")
"""The colours of numbers above and below zero, the same as in the heatmaps."""


def before_and_after(summary: Mapping[str, Any], units: Mapping[str, str], title: str, path: str | Path) -> None:
    """Write a PNG with one panel for each metric: the means before, after and of the change, with their intervals.

    summary: metric -> before, after and change, each with mean and interval. units: metric -> the label of its axis.
    """
    figure = Figure(figsize=(3.2 * len(summary) + 0.6, 3.6), layout="constrained")
    figure.suptitle(label(title))
    for number, (name, each) in enumerate(summary.items(), 1):
        axes = figure.add_subplot(1, len(summary), number)
        for place, (when, estimate) in enumerate(each.items()):
            mean = estimate["mean"]
            axes.bar(place, mean, color=COLOURS[when], width=0.7)
            low, high = ends_of(estimate)
            if low == high:
                axes.plot(place, mean, "o", color="0.2", markersize=3)
            else:
                axes.errorbar(place, mean, [[mean - low], [high - mean]], color="0.2", capsize=4)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(each)), list(each))
        axes.set(title=label(name), ylabel=label(units.get(name, name)))
    save(figure, path, 150)


def top_heads(panels: Sequence[tuple[str, str, Mapping[str, Any]]], path: str | Path, most: int = 20) -> None:
    """Write a PNG with panels side by side: in each the largest numbers of either sign, with their intervals.

    panels: title, unit, and label -> mean and interval; an interval of None is not drawn. Where there are simultaneous intervals, those are
    drawn: the largest of many numbers are shown. most: bars in a panel.
    """
    n = max(min(most, len(changes)) for _, _, changes in panels)
    figure = Figure(figsize=(5 * len(panels), 0.26 * n + 1.2), layout="constrained")
    for number, (title, unit, changes) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        chosen = sorted(changes.items(), key=lambda item: -abs(item[1]["mean"]))[:most][::-1]
        for place, (_, estimate) in enumerate(chosen):
            axes.barh(place, estimate["mean"], color=SIGNS[estimate["mean"] < 0])
            whisker(axes, place, estimate)
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_yticks(range(len(chosen)), [label(name) for name, _ in chosen])
        is_together = any(estimate.get("simultaneous") for estimate in changes.values())
        note = f"\nlines: 95 % for all {len(changes)} together" if is_together else ""
        axes.set(title=label(title), xlabel=label(unit) + note)
    save(figure, path, 150)


def whisker(axes: Any, place: float, estimate: Mapping[str, Any]) -> None:
    """Draw an estimate's interval as a horizontal line, or as a point where it has no length."""
    low, high = ends_of(estimate)
    if low == high:
        axes.plot(estimate["mean"], place, "o", color="0.2", markersize=3)
    else:
        axes.plot([low, high], [place, place], color="0.2", linewidth=1)


def ends_of(estimate: Mapping[str, Any]) -> tuple[float, float]:
    """The interval that is drawn: the simultaneous one where there is one; the mean alone where there is none. It contains the mean.

    Files of the first versions may hold an interval that rounding put beside its mean.
    """
    mean = estimate["mean"]
    low, high = estimate.get("simultaneous") or estimate["interval"] or (mean, mean)
    return min(low, mean), max(high, mean)

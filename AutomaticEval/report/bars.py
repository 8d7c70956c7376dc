"""Bars with intervals: numbers before and after an intervention, and the heads with the largest numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from AutomaticEval.report.labels import label, save

SIGNIFICANT = 0.05
"""What has a smaller p value gets a star."""
COLOURS = {"before": "#4c72b0", "after": "#dd8452", "change": "#55a868"}
LEAST_LINES = 3
"""A figure of fewer bars leaves room for so many, so that no bar fills it."""
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
            ends = ends_of(estimate)
            if ends is not None and ends[0] == ends[1]:
                axes.plot(place, mean, "o", color="0.2", markersize=3)
            elif ends is not None:
                axes.errorbar(place, mean, [[mean - ends[0]], [ends[1] - mean]], color="0.2", capsize=4)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(each)), [_tick(when, estimate) for when, estimate in each.items()])
        axes.set(title=label(name), ylabel=label(units.get(name, name)))
    save(figure, path, 150)


def _tick(when: str, estimate: Mapping[str, Any]) -> str:
    """The label of a bar, with the effect size and p of a change."""
    d, p = estimate.get("d"), estimate.get("p")
    return when if p is None else f"{when}\n" + ("" if d is None else f"d {d:.2g}, ") + f"p {p:.2g}"


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
        axes.set_ylim(-0.8, max(n, LEAST_LINES) - 0.2)
        axes.set(title=label(title), xlabel=label(unit) + _about_lines(changes))
    save(figure, path, 150)


def _about_lines(changes: Mapping[str, Any]) -> str:
    """A line that says what intervals are drawn, or that there are none."""
    if any(estimate.get("simultaneous") for estimate in changes.values()):
        return f"\nlines: 95 % for all {len(changes)} together"
    if changes and all(estimate["interval"] is None and "reason" in estimate for estimate in changes.values()):
        return "\nno lines: too few values for an interval"
    return ""


def whisker(axes: Any, place: float, estimate: Mapping[str, Any]) -> None:
    """Draw an estimate's interval as a horizontal line, or as a point where it has no length. Nothing where there is none."""
    ends = ends_of(estimate)
    if ends is not None and ends[0] == ends[1]:
        axes.plot(estimate["mean"], place, "o", color="0.2", markersize=3)
    elif ends is not None:
        axes.plot(ends, [place, place], color="0.2", linewidth=1)


def ends_of(estimate: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval that is drawn: the simultaneous one where there is one; None where there is none. It contains the mean.

    Files of the first versions may hold an interval that rounding put beside its mean.
    """
    mean, interval = estimate["mean"], estimate.get("simultaneous") or estimate["interval"]
    return None if interval is None else (min(interval[0], mean), max(interval[1], mean))

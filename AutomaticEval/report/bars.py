"""Figures of a number before and after, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"before": "#4c72b0", "after": "#dd8452", "change": "#55a868"}


def before_and_after(summary: Mapping[str, Any], units: Mapping[str, str], title: str, path: str | Path) -> None:
    """A panel a metric: before, after and change, means with their bootstrap intervals, as a PNG.

    summary: metric -> before, after and change, each with mean and interval. units: metric -> what its axis says.
    """
    figure = Figure(figsize=(3.2 * len(summary) + 0.6, 3.6), layout="constrained")
    figure.suptitle(title)
    for number, (name, each) in enumerate(summary.items(), 1):
        axes = figure.add_subplot(1, len(summary), number)
        for place, (when, found) in enumerate(each.items()):
            mean = found["mean"]
            low, high = found["interval"] or (mean, mean)
            axes.bar(place, mean, color=COLOURS[when], width=0.7)
            axes.errorbar(place, mean, [[mean - low], [high - mean]], color="0.2", capsize=4)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(each)), list(each))
        axes.set(title=name, ylabel=units.get(name, name))
    figure.savefig(path, dpi=150, format="png")


def top_heads(changes: Mapping[tuple[int, int], Any], unit: str, title: str, path: str | Path, most: int = 20) -> None:
    """The heads with the largest numbers, either sign, with their intervals, as a PNG.

    changes: (layer, head) -> mean and interval.
    """
    chosen = sorted(changes.items(), key=lambda item: -abs(item[1]["mean"]))[:most][::-1]
    figure = Figure(figsize=(6, 0.26 * len(chosen) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, found) in enumerate(chosen):
        mean = found["mean"]
        low, high = found["interval"] or (mean, mean)
        axes.barh(place, mean, color="#c44e52" if mean < 0 else "#4c72b0")
        axes.plot([low, high], [place, place], color="0.2", linewidth=1)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(chosen)), [f"{layer}:{head}" for (layer, head), _ in chosen])
    axes.set(title=title, xlabel=unit, ylabel="Layer:head")
    figure.savefig(path, dpi=150, format="png")

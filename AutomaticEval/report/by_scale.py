"""The figure of a steered model: scores and text metrics over the scales of a direction, a line for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from AutomaticEval.report.labels import LINES, label, save

STYLES = ("-", "--", ":")
"""Of lines whose colour is taken by another one."""
ACROSS = 3
"""So many panels stand side by side."""
MOST_CHARACTERS = 44
"""Of a name in the legend."""
MOST_BANDS = 3
"""Where more lines are drawn, their intervals are thin lines alone."""
MOST_TICKS = 9
SHARE = "share of "
"""How the unit of a text metric begins that is between 0 and 1."""


class Point(NamedTuple):
    """A number at one scale, with the ends of its interval."""

    scale: float
    value: float
    low: float
    high: float
    n: int
    """How many questions or texts it is of."""


class _Panel(NamedTuple):
    """One metric: task -> its points, in the order of the scales."""

    title: str
    unit: str
    lines: dict[str, list[Point]]
    """A scale at which a metric has no number is a point of NaN, which breaks the line."""


Rows = Sequence[Mapping[str, Any]]
"""As in the result of `main.py steer`, as JSON: a row for each task, metric and scale."""


def by_scale(scores: Rows, texts: Rows, units: Mapping[str, str], title: str, path: Path) -> None:
    """Write a PNG with a panel for each metric, in which each task has its line: scores with 1.96 standard errors, means of text metrics with
    their intervals.

    units: text metric -> what it counts. Of many tasks, a panel has those with the most questions: groups before their parts.
    """
    panels = _panels(scores, texts, units)
    tasks = list(dict.fromkeys(task for panel in panels for task in _largest(panel.lines)))
    looks: dict[str, dict[str, Any]] = {
        task: {"color": LINES[n % len(LINES)], "linestyle": STYLES[n // len(LINES) % len(STYLES)]}
        for n, task in enumerate(tasks)
    }
    columns = max(1, min(ACROSS, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.2 * columns + 0.8, 3.1 * rows + 0.9 + 0.2 * len(tasks)), layout="constrained")
    figure.suptitle("\n".join(wrap(label(title), 44 * columns)))
    for number, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(rows, columns, number), panel, looks)
    if panels:
        handles = [figure.axes[0].plot([], [], "o", **looks[task], markersize=4)[0] for task in tasks]
        names = [label(_shortened(task)) for task in tasks]
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(tasks), columns), fontsize="small")
    save(figure, path, 150)


def _panels(scores: Rows, texts: Rows, units: Mapping[str, str]) -> list[_Panel]:
    """A panel for each metric that has a number. Intervals of what the result says to be a share end at 0 and 1."""
    panels: dict[tuple[str, str], _Panel] = {}

    def put(row: Mapping[str, Any], unit: str, value: float, ends: tuple[float, float]) -> None:
        panel = panels.setdefault((row["metric"], unit), _Panel(row["metric"], unit, {}))
        panel.lines.setdefault(row["task"], []).append(Point(row["scale"], value, *ends, row["n"]))

    for each in scores:
        value, half = _number(each["value"]), 1.96 * (each["stderr"] or 0.0)
        ends = (value - half, value + half)
        put(each, "score", value, (max(0.0, ends[0]), min(1.0, ends[1])) if each.get("is_share") else ends)
    for each in texts:
        mean, unit = _number(each["mean"]), units[each["metric"]]
        low, high = each["interval"] or (mean, mean)
        put(each, unit, mean, (max(0.0, low), min(1.0, high)) if unit.startswith(SHARE) else (low, high))
    for panel in panels.values():
        for task in [task for task, points in panel.lines.items() if all(np.isnan(each.value) for each in points)]:
            del panel.lines[task]
    return [panel for panel in panels.values() if panel.lines]


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _draw(axes: Any, panel: _Panel, looks: Mapping[str, Mapping[str, Any]]) -> None:
    chosen = _largest(panel.lines)
    is_crowded = len(chosen) > MOST_BANDS
    every = sorted({each.scale for points in chosen.values() for each in points})
    for number, (task, points) in enumerate(chosen.items()):
        scales, values, low, high, _ = (np.array(column) for column in zip(*points, strict=True))
        if len(every) == 1:  # or all would stand on one line
            scales = scales + 0.06 * (number - (len(chosen) - 1) / 2)
        axes.plot(scales, values, "o", **looks[task], markersize=4, linewidth=1.4)
        axes.vlines(scales, low, high, color=looks[task]["color"], linewidth=1, alpha=0.3 if is_crowded else 0.6)
        if not is_crowded:
            axes.fill_between(scales, low, high, color=looks[task]["color"], alpha=0.12, linewidth=0)
    n_all = len(panel.lines)
    note = f"\n{len(chosen)} of {n_all} tasks: those with the most questions" if len(chosen) < n_all else ""
    axes.set(title=label(panel.title) + note, xlabel="scale", ylabel="\n".join(wrap(label(panel.unit), 34)))
    if len(every) <= MOST_TICKS:
        axes.set_xticks(every, [f"{scale:g}" for scale in every])
    if len(every) == 1:
        axes.set_xlim(every[0] - 0.5, every[0] + 0.5)
    if every[0] <= 0 <= every[-1]:
        axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")


def _largest(lines: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """As many tasks as there are colours: those with the most questions."""
    chosen = sorted(lines, key=lambda task: -max(each.n for each in lines[task]))[: len(LINES)]
    return {task: lines[task] for task in lines if task in chosen}


def _shortened(name: str) -> str:
    """A name with … in the place of its middle when it is long: the ends tell tasks apart."""
    half = (MOST_CHARACTERS - 1) // 2
    return name if len(name) <= MOST_CHARACTERS else f"{name[:half]}…{name[-half:]}"

"""Heatmaps with one cell for each head or position: layers upwards, heads or positions across."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from AutomaticEval.report.labels import label, save

PerHead = Mapping[tuple[int, int], float | None]
"""(layer, head) -> a number, or None where there is none."""
MOST_REACH = 3.0
MOST_PIXELS = 8000
"""The most pixels along one side of a figure."""
MOST_LABELS = 16
"""The most ticks along one axis. With more heads or layers, only every second or fourth is labelled."""


class Panel(NamedTuple):
    """One heatmap."""

    title: str
    values: PerHead
    unit: str
    """What the colours mean, for the colour bar."""
    diverging: bool = False
    """Whether numbers have a sign: then zero is white, and both ends of the scale are equally far from it."""
    ends: tuple[float, float] | None = None
    """The values at both ends of the colour scale, so that panels can be compared. None: those of the panel's own values, by `robust_ends`."""
    marked: tuple[int, int] | None = None
    """The cell that has a frame."""


def heatmaps(
    panels: Sequence[Panel],
    path: str | Path,
    *,
    columns: int | None = None,
    across: str = "Head",
    names: Sequence[str] = (),
    title: str = "",
) -> None:
    """Write heatmaps as one PNG. Cells without a number stay grey.

    columns: how many panels stand side by side; all by default. across: the label of the horizontal axis. names: of the columns, which are then numbered from 0, are as wide as
    a number, and have theirs in each cell. title: of the whole figure.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    grids = [_grid(panel.values) for panel in panels]
    n_layers, n_across = (max(grid[0].shape[axis] for grid in grids) for axis in (0, 1))
    wide, below = (0.5, 0.085 * max(map(len, names))) if names else (0.28, 0.0)
    size = (max(4.0, wide * n_across + 2) * columns, (max(3.0, 0.28 * n_layers + 1.0) + below) * rows)
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(
            "\n".join("\n".join(wrap(label(line), int(size[0] * 12))) for line in title.splitlines()), fontsize="medium"
        )
    for number, (panel, (grid, layers, heads)) in enumerate(zip(panels, grids, strict=True), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_facecolor("0.8")
        aspect: Literal["auto", "equal"] = "auto" if names else "equal"
        shown = axes.imshow(np.ma.masked_invalid(grid), aspect=aspect, origin="lower", **_colours(grid, panel))
        axes.set(title="\n".join(wrap(label(panel.title), 36)), xlabel=across, ylabel="Layer")
        _label(axes.xaxis, heads)
        _label(axes.yaxis, layers)
        if names:
            axes.set_xticks(range(len(heads)), [label(names[each]) for each in heads], rotation=90, fontsize="small")
            _write_numbers(axes, grid, shown)
        if panel.marked is not None:
            layer, head = panel.marked
            corner = (heads.index(head) - 0.5, layers.index(layer) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2, zorder=3))
        unit = "\n".join(wrap(label(panel.unit), 24))
        figure.colorbar(shown, ax=axes, label=unit, shrink=0.8, extend=_extend(grid, *shown.get_clim()))
    save(figure, path, min(150.0, MOST_PIXELS / max(size)))


def _write_numbers(axes: Any, grid: Any, shown: Any) -> None:
    """Two digits in each cell, dark on light colours and light on dark ones."""
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            red, green, blue, _ = shown.to_rgba(value)
            colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _grid(values: PerHead) -> tuple[Any, list[int], list[int]]:
    """[n_layers, n_heads], NaN where there is no number; the layers; and the heads."""
    layers, heads = sorted({layer for layer, _ in values}), sorted({head for _, head in values})
    grid = np.full((len(layers), len(heads)), np.nan)
    for (layer, head), value in values.items():
        grid[layers.index(layer), heads.index(head)] = np.nan if value is None else value
    return grid, layers, heads


def robust_ends(values: Iterable[float | None], *, diverging: bool = True) -> tuple[float, float] | None:
    """The ends of a colour scale, which a few extreme values do not set. None when there is no finite number.

    No end is further than MOST_REACH times the 95th percentile of the distances from the middle, which is 0 for signed numbers and the median
    for others; nor further than the values go.
    """
    known = np.array([value for value in values if value is not None and np.isfinite(value)])
    if not len(known):
        return None
    middle = 0.0 if diverging else float(np.median(known))
    reach = MOST_REACH * float(np.quantile(np.abs(known - middle), 0.95, method="lower"))
    if reach == 0:  # most are one number: what differs is all there is to see
        return float(known.min()), float(known.max())
    return max(float(known.min()), middle - reach), min(float(known.max()), middle + reach)


def _colours(grid: Any, panel: Panel) -> dict[str, Any]:
    """The colour map and its ends, as matplotlib's imshow takes them."""
    ends = panel.ends or robust_ends(grid.flat, diverging=panel.diverging)
    if not panel.diverging:
        low, high = ends or (None, None)
        return {"cmap": "viridis", "vmin": low, "vmax": high}
    end = max(map(abs, ends)) if ends else 1.0
    return {"cmap": "RdBu_r", "vmin": -(end or 1.0), "vmax": end or 1.0}


def _extend(grid: Any, low: float, high: float) -> str:
    """At which ends the colour bar has an arrow: where cells are beyond it."""
    known = grid[np.isfinite(grid)]
    beyond = bool((known < low).any()), bool((known > high).any())
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")


def _label(axis: Any, names: Sequence[int]) -> None:
    """Label as many cells as there is room for."""
    step = 1
    while len(names) / step > MOST_LABELS:
        step *= 2
    axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])

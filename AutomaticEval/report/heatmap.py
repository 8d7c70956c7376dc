"""Figures of numbers a head: one cell a head, layers down, heads across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from AutomaticEval.report.labels import label, save

PerHead = Mapping[tuple[int, int], float | None]
"""(layer, head) -> a number; None for no number."""
MOST_PIXELS = 8000
"""Along one side of a figure."""
MOST_LABELS = 16
"""Ticks along one axis; with more heads or layers, only every second or fourth is labelled."""


class Panel(NamedTuple):
    """One heatmap."""

    title: str
    values: PerHead
    unit: str
    """What the colours are, for the colour bar."""
    diverging: bool = False
    """Signed numbers: zero is white, and both ends are equally far."""
    ends: tuple[float, float] | None = None
    """The values at both ends of the colour scale, so that panels can be compared. None: the panel's own smallest and largest."""


def heatmaps(panels: Sequence[Panel], path: str | Path, *, columns: int | None = None, across: str = "Head") -> None:
    """Heatmaps as a PNG, so many in a row; all by default. Cells without a number stay grey."""
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    grids = [_grid(panel.values) for panel in panels]
    n_layers, n_across = (max(grid[0].shape[axis] for grid in grids) for axis in (0, 1))
    size = (max(4.0, 0.28 * n_across + 2) * columns, max(3.0, 0.28 * n_layers + 1.0) * rows)
    figure = Figure(figsize=size, layout="constrained")
    for number, (panel, (grid, layers, heads)) in enumerate(zip(panels, grids, strict=True), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_facecolor("0.8")
        shown = axes.imshow(np.ma.masked_invalid(grid), aspect="equal", origin="lower", **_colours(grid, panel))
        axes.set(title="\n".join(wrap(label(panel.title), 36)), xlabel=across, ylabel="Layer")
        _label(axes.xaxis, heads)
        _label(axes.yaxis, layers)
        figure.colorbar(shown, ax=axes, label="\n".join(wrap(label(panel.unit), 24)), shrink=0.8)
    save(figure, path, min(150.0, MOST_PIXELS / max(size)))


def _grid(values: PerHead) -> tuple[Any, list[int], list[int]]:
    """[n_layers, n_heads] with NaN where there is none, and the names of both axes."""
    layers, heads = sorted({layer for layer, _ in values}), sorted({head for _, head in values})
    grid = np.full((len(layers), len(heads)), np.nan)
    for (layer, head), value in values.items():
        grid[layers.index(layer), heads.index(head)] = np.nan if value is None else value
    return grid, layers, heads


def _colours(grid: Any, panel: Panel) -> dict[str, Any]:
    if not panel.diverging:
        low, high = panel.ends or (None, None)
        return {"cmap": "viridis", "vmin": low, "vmax": high}
    finite = np.asarray(panel.ends) if panel.ends else grid[np.isfinite(grid)]
    end = float(np.abs(finite).max()) if len(finite) else 1.0
    return {"cmap": "RdBu_r", "vmin": -(end or 1.0), "vmax": end or 1.0}


def _label(axis: Any, names: Sequence[int]) -> None:
    step = 1
    while len(names) / step > MOST_LABELS:
        step *= 2
    axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])

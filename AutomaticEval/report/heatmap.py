"""Heatmaps with one cell for each head: layers upwards, heads across."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

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


def heatmaps(panels: Sequence[Panel], path: str | Path, *, columns: int | None = None, across: str = "Head") -> None:
    """Write heatmaps as one PNG. Cells without a number stay grey.

    columns: how many panels stand side by side; all by default. across: the label of the horizontal axis.
    """
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
        unit = "\n".join(wrap(label(panel.unit), 24))
        figure.colorbar(shown, ax=axes, label=unit, shrink=0.8, extend=_extend(grid, *shown.get_clim()))
    save(figure, path, min(150.0, MOST_PIXELS / max(size)))


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

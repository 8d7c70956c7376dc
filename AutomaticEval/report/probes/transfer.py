"""The figure of probes that are judged on other runs: a cell for each run that was learned from and each that is judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from AutomaticEval.report.labels import label, save

CHANCE = 0.5
"""White; what is below it is blue, and above it red."""
DARK = 0.32
"""Numbers in cells that are further from chance are white, and others black."""


def transfer_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a heatmap of AUROCs with their intervals. result: of `probe`, as JSON."""
    runs, cells = result["transfer"]["runs"], result["transfer"]["cells"]
    names = [label(_name(number, each["path"])) for number, each in enumerate(runs)]
    grid = [[float("nan")] * len(runs) for _ in runs]
    size = 2.4 + 1.5 * len(runs)
    figure = Figure(figsize=(size + 1.6, size), layout="constrained")
    axes = figure.subplots()
    for each in cells:
        mean = each["auroc"]["mean"]
        grid[each["train"]][each["test"]] = float("nan") if mean is None else mean
        colour = "black" if mean is None or abs(mean - CHANCE) < DARK else "white"
        axes.text(each["test"], each["train"], _told(each["auroc"]), ha="center", va="center", color=colour)
    axes.set_facecolor("0.9")
    shown = axes.imshow(grid, cmap="RdBu_r", vmin=0, vmax=1)
    places = range(len(runs))
    axes.set_xticks(places, names, rotation=20, ha="right")
    axes.set_yticks(places, names)
    axes.set(xlabel="judged on", ylabel="learned from, and place chosen in")
    n_positions = len(result["settings"].get("positions", [""]))
    at = result["settings"]["position"] if n_positions == 1 else f"the best of {n_positions} positions"
    figure.suptitle(label(f"{result['classes']['target']} at {at}: AUROC, 95 % interval"))
    figure.colorbar(shown, ax=axes, label="AUROC (0.5: chance)", shrink=0.8)
    save(figure, path, 150)


def _name(number: int, path: str) -> str:
    """The run's number, and how its name begins: folders end with their time."""
    return f"{number + 1}: {path if len(path) <= 28 else path[:27] + '…'}"


def _told(auroc: Mapping[str, Any]) -> str:
    if auroc["mean"] is None:
        return "none"
    interval = auroc["interval"]
    return f"{auroc['mean']:.3f}" + ("" if interval is None else "\n[{:.3f}, {:.3f}]".format(*interval))

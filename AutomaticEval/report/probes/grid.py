"""The figure of probes at several positions, layer by position; and the places of a result that stand at one position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from AutomaticEval.report.heatmap import Panel, heatmaps
from AutomaticEval.report.labels import by_kind
from AutomaticEval.report.probes.classes import chosen_told, measure_told, title_told

CHANCE = 0.5
MOST_COLUMNS = 32
"""Positions side by side; figures with more of them have one panel a row."""


def position_of(result: Mapping[str, Any]) -> str:
    """The position of the place that folds chose most often; files of the first version have one position."""
    position: str = result["best"].get("position", result["settings"]["position"])
    return position


def at_one_position(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The places at that position: one for each site."""
    best = position_of(result)
    return [each for each in result["places"] if each.get("position", best) == best]


def grid_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a heatmap of AUROCs for each kind of site, on one scale of colours, with a frame around the place that folds chose most often. result: of `probe`, as JSON."""
    positions, best, classes = result["settings"]["positions"], result["best"], result["classes"]
    panels = []
    for kind, of_kind in by_kind(result["places"]).items():
        cells = [(layer, positions.index(each["position"]), each) for layer, each in of_kind]
        values = {(layer, at): each["probe"]["auroc"]["mean"] for layer, at, each in cells}
        marked = next(
            (
                (layer, at)
                for layer, at, each in cells
                if (each["site"], each["position"]) == (best["site"], best["position"])
            ),
            None,
        )
        panels.append(Panel(kind, values, f"{measure_told(classes)} (0.5: chance)", ends=(CHANCE, 1.0), marked=marked))
    chosen = f"{best['site']} at {best['position']}, {chosen_told(best['places'])}"
    title = f"{classes['target']}: {result['run']['model']} ({title_told(classes)})\nframe: {chosen}"
    beside = max(1, MOST_COLUMNS // len(positions))
    heatmaps(panels, path, columns=min(len(panels), beside), across="", names=positions, title=title)

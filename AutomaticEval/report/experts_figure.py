"""The load of each expert of each layer, as a heatmap around the even load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from AutomaticEval.report.heatmap import Panel, heatmaps


def experts_figure(result: Mapping[str, Any], path: Path) -> None:
    """Layers upwards, experts across: by which part of the even load an expert has more or less."""
    values = {(each["layer"], each["expert"]): each["relative"] - 1.0 for each in result["experts"]}
    title = f"{Path(result['run']['model']).name}: load of experts, {result['n_questions']} questions"
    unit = "load / even load − 1"
    heatmaps([Panel("", values, unit, diverging=True)], path, across="Expert", title=title)

"""The figure of two runs over the same questions: what became of each task's score, and how alike the layers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from AutomaticEval.report.bars import LEAST_LINES, SIGNIFICANT, SIGNS, whisker
from AutomaticEval.report.labels import LINES, label, save
from AutomaticEval.sites import kind_and_layer

MOST_TASKS = 30
"""Of more tasks, those whose score changed most are drawn."""


def two_runs(tasks: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write a PNG. tasks and sites: as in the result of `compare_runs`, as JSON."""
    shown = sorted(tasks, key=lambda each: -abs(each["difference"]["mean"]))[:MOST_TASKS][::-1]
    layered = [each for each in sites if kind_and_layer(each["site"])[1] is not None]
    figure = Figure(figsize=(6 + 5 * bool(layered), max(3.4, 0.3 * len(shown) + 1.4)), layout="constrained")
    figure.suptitle(label(title))
    _scores(figure.add_subplot(1, 1 + bool(layered), 1), shown)
    if layered:
        _likeness(figure.add_subplot(1, 2, 2), layered)
    save(figure, path, 150)


def _scores(axes: Any, tasks: Sequence[Mapping[str, Any]]) -> None:
    for place, each in enumerate(tasks):
        mean = each["difference"]["mean"]
        axes.barh(place, mean, color=SIGNS[mean < 0])
        whisker(axes, place, each["difference"])
    axes.axvline(0, color="0.4", linewidth=0.8)
    significant = [(each.get("p_corrected") or 1.0) < SIGNIFICANT for each in tasks]
    names = [
        f"{each['task'] or 'questions'} (n = {each['n']}){'*' * is_so}"
        for each, is_so in zip(tasks, significant, strict=True)
    ]
    axes.set_yticks(range(len(tasks)), [label(name) for name in names])
    axes.set_ylim(-0.8, max(len(tasks), LEAST_LINES) - 0.2)
    note = f"\n*: p < {SIGNIFICANT}, corrected for all lines" if any(significant) else ""
    axes.set(title="Change of the score", xlabel=f"score, after - before{note}")


def _likeness(axes: Any, sites: Sequence[Mapping[str, Any]]) -> None:
    """A line for each kind of site: the cosine, drawn through, and CKA, dashed."""
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for each in sites:
        kind, layer = kind_and_layer(each["site"])
        assert layer is not None
        kinds.setdefault(kind, []).append((layer, each))
    for number, (kind, places) in enumerate(kinds.items()):
        colour = LINES[number % len(LINES)]
        places.sort(key=lambda place: place[0])
        for style, name, values in (
            ("-", "cosine", [(layer, (each["cosine"] or {}).get("mean")) for layer, each in places]),
            ("--", "CKA", [(layer, each["cka"]) for layer, each in places]),
        ):
            known = [(layer, value) for layer, value in values if value is not None]
            if known:
                axes.plot(
                    *zip(*known, strict=True), style, color=colour, marker="o", markersize=3, label=f"{kind}: {name}"
                )
    axes.set(title="Likeness at the question's last token", xlabel="layer", ylabel="1: alike")
    low, _ = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), 1 + 0.03 * (1 - min(low, 0.9)))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")

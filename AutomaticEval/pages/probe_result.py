"""A probe's result file as a page shows it: findings, curves over layers, the best place beside baselines, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from AutomaticEval.report.page.charts import Chart, intervals_chart, lines_chart
from AutomaticEval.report.probes.classes import chosen_told, classes_told, measure_told
from AutomaticEval.report.probes.grid import at_one_position, position_of
from AutomaticEval.sites import kind_and_layer

CHANCE = 0.5


def probe_section(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs of a probe. Raises KeyError, TypeError, ValueError for a result that lacks something."""
    classes, best = result["classes"], result["best"]["judged"]["auroc"]
    baselines = [(each["told"], each["judged"]["auroc"]) for each in result["baselines"] if each["judged"]]
    return {
        "target": f"{classes['target']}: {classes_told(classes)}",
        "position": _position(result),
        "split": result["settings"]["split"],
        "findings": result["findings"],
        "measure": measure_told(classes),
        "best": said(best),
        "by_class": [
            (name, str(classes["counts"][name]), said(each))
            for name, each in result["best"].get("by_class", {}).items()
        ],
        "charts": [_by_layer(result, baselines), _beside(best, baselines, measure_told(classes))],
        "places": [
            (each["site"], said(each["probe"]["auroc"]), said(each["difference_of_means"]), _p(each.get("p")))
            for each in at_one_position(result)
        ],
        "matrices": [*_grid(result), *_transfer(result)],
        "without": [(each["told"], each["reason"]) for each in result["baselines"] if not each["judged"]],
    }


def _position(result: Mapping[str, Any]) -> str:
    """Of a grid the position that is shown, of how many, and in how many folds its place was chosen."""
    n = len(result["settings"].get("positions", [""]))
    chosen = f", the best of {n} positions ({chosen_told(result['best']['places'])})"
    return position_of(result) + (chosen if n > 1 else "")


Matrix = tuple[str, list[str], list[tuple[str, ...]]]
"""What a table holds, its columns, and its rows."""


def _grid(result: Mapping[str, Any]) -> list[Matrix]:
    """The probes at several positions: a row for each site."""
    positions = result["settings"].get("positions", [])
    if len(positions) < 2:
        return []
    rows: dict[str, dict[str, str]] = {}
    for each in result["places"]:
        mean = each["probe"]["auroc"]["mean"]
        rows.setdefault(each["site"], {})[each["position"]] = "unknown" if mean is None else f"{mean:.3f}"
    cells = [(site, *(row.get(position, "") for position in positions)) for site, row in rows.items()]
    return [(f"{measure_told(result['classes'])} at each site and position", ["Site", *positions], cells)]


def _transfer(result: Mapping[str, Any]) -> list[Matrix]:
    """The probes that are judged on other runs: a row for each run that was learned from."""
    if "transfer" not in result:
        return []
    names = [f"{number}: {each['path']}" for number, each in enumerate(result["transfer"]["runs"], 1)]
    cells = {(each["train"], each["test"]): said(each["auroc"]) for each in result["transfer"]["cells"]}
    numbers = range(len(names))
    rows = [(name, *(cells.get((train, test), "") for test in numbers)) for train, name in enumerate(names)]
    return [("AUROC of each run's probe on each run", ["Learned from", *(f"on {name}" for name in names)], rows)]


def said(estimate: Mapping[str, Any]) -> str:
    """0.712 [0.650, 0.774]."""
    ends = estimate.get("interval")
    if estimate["mean"] is None:
        return "unknown"
    return f"{estimate['mean']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _by_layer(result: Mapping[str, Any], baselines: list[tuple[str, Mapping[str, Any]]]) -> Chart:
    rows = []
    for each in at_one_position(result):
        kind, layer = kind_and_layer(each["site"])
        auroc = each["probe"]["auroc"]
        low, high = auroc.get("simultaneous") or auroc["interval"] or (None, None)
        at = layer if layer is not None else (-1 if kind == "embed" else 0)
        rows.append(
            {
                "series": kind,
                "layer": at,
                "mean": auroc["mean"],
                "low": low,
                "high": high,
                "said": f"{each['site']}: AUROC {said(auroc)}",
            }
        )
    real = [each for each in baselines if not each[0].startswith("shuffled labels")]
    marked, told = [(CHANCE, "chance")], "The solid line is chance, 0.5."
    if real:
        name, auroc = max(real, key=lambda each: each[1]["mean"])
        marked = [(auroc["mean"], name), (CHANCE, "chance")]
        told = f"The dashed line is the best baseline ({name}, {auroc['mean']:.3f}); the solid line is chance, 0.5."
    band = "Bands: 95 % intervals of all places together." if any(row["low"] is not None for row in rows) else ""
    where, measure = f" at {position_of(result)}" if "grid" in result else "", measure_told(result["classes"])
    title = f"{measure}, by layer{where}"
    return lines_chart(title, f"{told} {band}".strip(), rows, ("layer", measure), marked=marked)


def _beside(best: Mapping[str, Any], baselines: list[tuple[str, Mapping[str, Any]]], measure: str) -> Chart:
    rows = []
    for number, (name, auroc) in enumerate([("best place", best), *baselines]):
        low, high = auroc["interval"] or (None, None)
        rows.append(
            {
                "name": name,
                "mean": auroc["mean"],
                "low": low,
                "high": high,
                "said": f"{name}: AUROC {said(auroc)}",
                "series": 0 if number == 0 else 1,
            }
        )
    told = "The place is chosen inside the training folds. Bars: 95 % intervals. The line is chance."
    return intervals_chart(
        "Best place, and what needs no activations", told, rows, measure, line=CHANCE, is_offset=False
    )

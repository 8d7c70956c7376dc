"""The figure of probes: how well each layer tells the classes apart, beside what tells them apart without activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from AutomaticEval.report.bars import ends_of
from AutomaticEval.report.labels import LINES, label, save
from AutomaticEval.report.probes.classes import measure_told, title_told
from AutomaticEval.report.probes.grid import at_one_position, position_of
from AutomaticEval.sites import kind_and_layer

CHANCE = 0.5
SHUFFLED = "shuffled labels"
Rows = Sequence[Mapping[str, Any]]


def probe_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG. result: of `probe`, as JSON."""
    places, best = at_one_position(result), result["best"]["judged"]["auroc"]
    baselines = [(each["told"], each["judged"]["auroc"]) for each in result["baselines"] if each["judged"]]
    figure = Figure(figsize=(11.5, 5), layout="constrained")
    classes = result["classes"]
    n, measure = title_told(classes), f"{measure_told(classes)} (0.5: chance)"
    figure.suptitle(label(f"{classes['target']} at {position_of(result)}: {result['run']['model']} ({n})"))
    left, right = figure.subplots(1, 2)
    _layers(left, places, len(result["places"]), measure)
    _lines(left, baselines)
    _beside(right, [("best place", best), *baselines], measure)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    save(figure, path, 150)


def _layers(axes: Any, places: Rows, n_places: int, measure: str) -> None:
    """A line for each kind of site with the intervals of all places together; dotted, the difference of means."""
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for each in places:
        kind, layer = kind_and_layer(each["site"])
        kinds.setdefault(kind, []).append((layer or 0, each))
    for number, (kind, of_kind) in enumerate(kinds.items()):
        colour = LINES[number % len(LINES)]
        of_kind.sort(key=lambda place: place[0])
        layers = [layer for layer, _ in of_kind]
        values = [each["probe"]["auroc"] for _, each in of_kind]
        low, high = zip(*(ends_of(each) or (each["mean"], each["mean"]) for each in values), strict=True)
        axes.plot(
            layers, [each["mean"] for each in values], "-o", color=colour, markersize=4, label=label(f"{kind}: probe")
        )
        if len(layers) > 1:
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(layers, low, high, color=colour)
        along = [each["difference_of_means"]["mean"] for _, each in of_kind]
        axes.plot(layers, along, ":", color=colour, linewidth=1, label=label(f"{kind}: difference of means"))
    axes.set(xlabel="layer", ylabel=measure)
    has_intervals = any(ends_of(each["probe"]["auroc"]) for each in places)
    told = f", with 95 % intervals{' of all together' * (n_places > 1)}" if has_intervals else ""
    axes.set_title(f"By layer{told}", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _lines(axes: Any, baselines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Chance, and the baseline that is the best one; shuffled labels are no baseline to beat."""
    axes.axhline(CHANCE, color="0.5", linewidth=0.8)
    told, auroc = max(
        (each for each in baselines if not each[0].startswith(SHUFFLED)), key=lambda each: each[1]["mean"]
    )
    axes.axhline(auroc["mean"], color="0.3", linewidth=1, linestyle="--", label=label(f"best baseline: {told}"))


def _beside(axes: Any, rows: Sequence[tuple[str, Mapping[str, Any]]], measure: str) -> None:
    """The best place, chosen inside the training folds, and each baseline, with their intervals."""
    for number, (_, auroc) in enumerate(rows):
        mean = auroc["mean"]
        low, high = auroc["interval"] or (mean, mean)
        colour = "0.35" if number else LINES[0]
        axes.errorbar(mean, -number, xerr=[[mean - low], [high - mean]], fmt="o", markersize=5, color=colour, capsize=3)
    axes.axvline(CHANCE, color="0.5", linewidth=0.8)
    axes.axhline(-0.5, color="0.85", linewidth=0.8)
    axes.set_yticks([-number for number in range(len(rows))], [label(told) for told, _ in rows], fontsize="small")
    has_intervals = any(auroc["interval"] for _, auroc in rows)
    axes.set(xlabel=f"{measure}{', 95 % interval' * has_intervals}")
    axes.set_title("The best place, and what needs no activations", fontsize="medium")

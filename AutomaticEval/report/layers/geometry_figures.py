"""Figures of the shape of a run's activations: norms, effective rank, likeness of layers, and the first two principal components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from AutomaticEval.report.bars import ends_of
from AutomaticEval.report.labels import LINES, by_stream, label, plain_log_ticks, save
from AutomaticEval.sites import kind_and_layer

Json = Mapping[str, Any]
OTHER = "0.3"
"""The colour of another run's lines."""
MOST_TICKS = 14
MOST_TASKS = 7
MOST_NAMED = 8
"""Of more places, the legend names the first, the middle and the last one."""
VERDICTS = {True: ("right", LINES[2]), False: ("wrong", LINES[3]), None: ("no verdict", LINES[7])}


def shape_figure(result: Json, path: Path) -> None:
    """Write a PNG: norms and effective rank by layer, the variance explained, and norms by position."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(_title(result))
    (length, rank), (explained, position) = figure.subplots(2, 2)
    _norms(length, result)
    _ranks(rank, result)
    _explained(explained, result["places"])
    _by_position(figure, position, result)
    save(figure, path, 150)


def between_figure(result: Json, path: Path) -> None:
    """Write a PNG: CKA and cosine between all pairs of places."""
    names = [each["site"] for each in result["places"]]
    title = f"Between layers: {result['run']['model']} ({result['n_compared']} questions)"
    _matrices(result["between"], names, names, ("", ""), title, path)


def two_runs_figure(result: Json, path: Path) -> None:
    """Write a PNG: CKA and cosine of each place of one run with each of the other."""
    names = [[each["site"] for each in result[of]] for of in ("places", "other_places")]
    told = [f" of {result[of]['model']} ({result[of]['path']})" for of in ("run", "other")]
    title = f"Between two runs ({result['n_compared']} questions)"
    _matrices(result["between_runs"], names[0], names[1], (told[0], told[1]), title, path)


def scatter_figure(result: Json, path: Path) -> None:
    """Write a PNG: the first two principal components of one place, by verdict, or by task where there are several."""
    of = result["scatter"]
    points = np.array(of["points"])
    tasks = list(dict.fromkeys(of["task"]))
    has_verdicts, has_tasks = any(each is not None for each in of["correct"]), len(tasks) > 1
    ways = [each for each, there in (("correct", has_verdicts), ("task", has_tasks)) if there] or ["correct"]
    figure = Figure(figsize=(5.6 * len(ways) + 0.4, 5), layout="constrained")
    figure.suptitle(
        label(f"{of['site']} at {result['settings']['position']}: {result['run']['model']} ({len(points)} questions)")
    )
    place = next(each for each in result["places"] if each["site"] == of["site"])
    shares = [*place["explained"][:2], 0.0, 0.0]
    for number, way in enumerate(ways, 1):
        axes = figure.add_subplot(1, len(ways), number)
        for told, colour, chosen in _classes(of, way, tasks):
            at = points[np.array(chosen)]
            axes.scatter(
                at[:, 0], at[:, 1], s=14, alpha=0.7, color=colour, linewidths=0, label=label(f"{told} ({len(at)})")
            )
        axes.set(xlabel=f"component 1 ({shares[0]:.1%} of the variance)", ylabel=f"component 2 ({shares[1]:.1%})")
        axes.set_title("By verdict" if way == "correct" else "By task", fontsize="medium")
        axes.legend(fontsize="small")
    save(figure, path, 150)


def _classes(of: Json, way: str, tasks: Sequence[Any]) -> list[tuple[str, str, list[int]]]:
    """(name, colour, numbers of its points) of each class. Tasks beyond the seven largest are one class."""
    if way == "correct":
        found = [
            (told, colour, [n for n, each in enumerate(of["correct"]) if each is value])
            for value, (told, colour) in VERDICTS.items()
        ]
        return [each for each in found if each[2]]
    largest = sorted(tasks, key=lambda task: -of["task"].count(task))[:MOST_TASKS]
    named = [
        (str(task), LINES[n], [at for at, each in enumerate(of["task"]) if each == task])
        for n, task in enumerate(largest)
    ]
    rest = [at for at, each in enumerate(of["task"]) if each not in largest]
    return [*named, ("other tasks", LINES[7], rest)] if rest else named


def _norms(axes: Any, result: Json) -> None:
    for number, (kind, of_kind) in enumerate(by_stream(result["places"]).items()):
        layers, colour = [layer for layer, _ in of_kind], LINES[number % len(LINES)]
        norms = [each["norm"] for _, each in of_kind]
        ends = np.array([ends_of(each) or (each["mean"],) * 2 for each in norms])
        _line(axes, of_kind, [each["mean"] for each in norms], "-o", colour, kind)
        axes.fill_between(layers, ends[:, 0], ends[:, 1], color=colour, alpha=0.15, linewidth=0)
    for kind, of_kind in by_stream(result.get("other_places", ())).items():
        _line(axes, of_kind, [each["norm"]["mean"] for _, each in of_kind], "-s", OTHER, f"other run, {kind}")
    _by_layer(axes, "Mean norm at the question's token", "L2 norm")


def _ranks(axes: Any, result: Json) -> None:
    """Effective rank and participation ratio, and those of random rows of the same number and width."""
    for number, (kind, of_kind) in enumerate(by_stream(result["places"]).items()):
        for style, name in (("-o", "effective_rank"), (":o", "participation_ratio")):
            told = f"{kind}: {name.replace('_', ' ')}"
            _line(axes, of_kind, [each[name] for _, each in of_kind], style, LINES[number % len(LINES)], told)
    (place, *_) = result["places"]
    told = f"random rows, n = {place['n']}: effective rank"
    axes.axhline(place["random_effective_rank"], color="0.5", linestyle="--", linewidth=1, label=told)
    for kind, of_kind in by_stream(result.get("other_places", ())).items():
        values = [each["effective_rank"] for _, each in of_kind]
        _line(axes, of_kind, values, "-s", OTHER, f"other run, {kind}: effective rank")
    _by_layer(axes, "How many directions the rows fill", "directions")


def _line(
    axes: Any, of_kind: Sequence[tuple[int, Json]], values: Sequence[Any], style: str, colour: str, told: str
) -> None:
    """The values that are known; nothing where none is."""
    known = [(layer, value) for (layer, _), value in zip(of_kind, values, strict=True) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), style, color=colour, markersize=3.5, linewidth=1.2, label=label(told))


def _by_layer(axes: Any, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="layer (-1: the embeddings)", ylabel=unit, yscale="log")
    plain_log_ticks(axes.yaxis)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="x-small")


def _explained(axes: Any, places: Sequence[Json]) -> None:
    """The cumulative share of the variance: a line a place, from the first layer (dark) to the last (light)."""
    from matplotlib import colormaps

    drawn = [each for each in places if each["explained"]]
    colours = colormaps["viridis"](np.linspace(0, 0.9, max(1, len(drawn))))
    named = range(len(drawn)) if len(drawn) <= MOST_NAMED else {0, len(drawn) // 2, len(drawn) - 1}
    for number, (each, colour) in enumerate(zip(drawn, colours, strict=False)):
        is_named = number in named
        cumulative = np.cumsum(each["explained"])
        axes.plot(
            range(1, len(cumulative) + 1),
            cumulative,
            color=colour,
            linewidth=1.2,
            label=label(each["site"]) if is_named else None,
        )
    axes.set(
        title="Variance explained by the first components",
        xlabel="components",
        ylabel="share of the variance",
        ylim=(0, 1.03),
        xscale="log",
    )
    plain_log_ticks(axes.xaxis)
    if drawn:
        told = f"3 of {len(drawn)} places, in order" if len(drawn) > MOST_NAMED else None
        axes.legend(fontsize="small", title=told, title_fontsize="small")


def _by_position(figure: Any, axes: Any, result: Json) -> None:
    """A heatmap of log norms: layers upwards, positions across, counted from the start where the run kept these, and then from the end."""
    ends = result["norms_by_position"]
    start = (
        ends["from_start"] if len(ends["from_start"]["positions"]) and ends["from_start"]["positions"][0] == 0 else None
    )
    parts = [each for each in (start, ends["from_end"]) if each is not None and each["positions"]]
    if not parts:
        axes.text(0.5, 0.5, "no row of a prompt was kept", transform=axes.transAxes, ha="center", color="0.5")
        return
    if len(parts) == 1 and len(parts[0]["positions"]) == 1:
        _at_one_position(axes, result, parts[0])
        return
    tables = [np.array(each["means"], dtype=float) for each in parts]
    gap = np.full((len(tables[0]), 1), np.nan)
    whole = tables[0] if len(tables) == 1 else np.hstack([tables[0], gap, tables[1]])
    names = [str(each) for each in parts[0]["positions"]] + (
        [] if len(parts) == 1 else ["", *map(str, parts[1]["positions"])]
    )
    with np.errstate(divide="ignore"):
        shown = axes.imshow(np.ma.masked_invalid(np.log10(whole)), aspect="auto", origin="lower", cmap="viridis")
    axes.set_facecolor("0.92")
    _ticks(axes.xaxis, names)
    _ticks(axes.yaxis, [_name(each["site"]) for each in result["places"]])
    axes.set(
        title="Mean norm by position (negative: from the prompt's end)", xlabel="position in the prompt", ylabel="layer"
    )
    figure.colorbar(shown, ax=axes, label="log10 of the mean L2 norm")


def _at_one_position(axes: Any, result: Json, of: Json) -> None:
    """Lines by layer: a heatmap of one position would be a block of stripes."""
    (position,) = of["positions"]
    held = [{"site": each["site"], "at": mean} for each, (mean,) in zip(result["places"], of["means"], strict=True)]
    for number, (kind, of_kind) in enumerate(by_stream(held).items()):
        _line(axes, of_kind, [each["at"] for _, each in of_kind], "-o", LINES[number % len(LINES)], kind)
    _by_layer(axes, f"Mean norm at position {position}, the only one that the run kept", "L2 norm")


def _matrices(
    of: Json, rows: Sequence[str], columns: Sequence[str], axes_names: tuple[str, str], title: str, path: Path
) -> None:
    """Heatmaps of CKA and, where there is one, of the cosine. axes_names: of the vertical and the horizontal axis."""
    panels = [("linear CKA", of["cka"], "viridis", 0.0)]
    if of["cosine"] is not None:
        low = float(np.nanmin(np.array(of["cosine"], dtype=float)))
        panels.append(("mean cosine", of["cosine"], "viridis" if low >= 0 else "RdBu_r", 0.0 if low >= 0 else -1.0))
    elif of.get("no_cosine"):
        title += f"\nno cosine: {of['no_cosine']}"
    figure = Figure(figsize=(5.4 * len(panels) + 0.4, 5), layout="constrained")
    figure.suptitle(label(title))
    for number, (told, values, colours, low) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        grid = np.ma.masked_invalid(np.array(values, dtype=float))
        shown = axes.imshow(grid, origin="lower", cmap=colours, vmin=low, vmax=1)
        axes.set_facecolor("0.8")
        _ticks(axes.yaxis, [_name(each) for each in rows])
        _ticks(axes.xaxis, [_name(each) for each in columns])
        axes.set(title=told, xlabel=label(f"layer{axes_names[1]}"), ylabel=label(f"layer{axes_names[0]}"))
        figure.colorbar(
            shown,
            ax=axes,
            shrink=0.85,
            label="1: alike" + "; grey: the rows are all the same" * bool(np.ma.is_masked(grid)),
        )
    save(figure, path, 150)


def _ticks(axis: Any, names: Sequence[str]) -> None:
    """Label as many as there is room for."""
    step = 1
    while len(names) / step > MOST_TICKS:
        step *= 2
    axis.set_ticks(range(0, len(names), step), [label(name) for name in names[::step]], fontsize="small")


def _name(key: str) -> str:
    kind, layer = kind_and_layer(key)
    return str(layer) if kind == "resid_post" else "emb" if kind == "embed" else key


def _title(result: Json) -> str:
    also = f" and {result['other']['model']} ({result['other']['path']})" if "other" in result else ""
    return label(
        f"Shape of the activations at {result['settings']['position']}: {result['run']['model']} ({result['run']['path']}){also}, {result['n_questions']} questions"
    )

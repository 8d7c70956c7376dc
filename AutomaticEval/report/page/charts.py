"""Charts as SVG: Vega-Lite descriptions, drawn when the page is made, so that the page itself runs no library.

The colours are variables of the page's style sheet, so that charts are dark where the page is. Each mark has its numbers in words, as a label
that screen readers read and that the page shows under the pointer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from AutomaticEval.safe_text import shown

WIDTHS = {"wide": 760, "narrow": 340}
"""The two widths in which each chart is drawn: for a desk, and for a phone."""
N_COLOURS = 6
ROOM = 24
"""Beside the labels, for fonts that are wider than the one with which they were measured."""
LETTERS = {"wide": 31, "narrow": 17}
"""So long may a line of a label be; longer names have several lines."""
MOST_LINES = 4
TICKS = {"wide": 6, "narrow": 3}
LINE_HEIGHT = 15
FONT = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
Rows = Sequence[Mapping[str, Any]]


class Chart(NamedTuple):
    """One chart, drawn in every width."""

    title: str
    told: str
    """What is drawn, in a sentence."""

    svg: Mapping[str, str]
    """Name of a width -> SVG mark-up."""

    legend: Sequence[tuple[str, str]] = ()
    """(class of the colour, name) of each series."""


def colour(number: int) -> str:
    """The colour of a series, as the style sheet names it."""
    return f"var(--series-{number % N_COLOURS})"


def intervals_chart(
    title: str,
    told: str,
    rows: Rows,
    axis: str,
    *,
    line: float | None = None,
    is_offset: bool = True,
    is_change: bool = False,
) -> Chart:
    """A line of names, each with a point and its interval. rows: name, mean, low, high (both may be None), said, series.

    line: a value that is marked, such as chance. is_offset: the series of a name stand one below the other.
    is_change: the axis is symmetric about 0, and as wide as the largest value.
    """
    return Chart(
        title,
        told,
        {
            width: _drawn(
                *_intervals(rows, axis, line, LETTERS[width], is_offset=is_offset, is_change=is_change), width
            )
            for width in WIDTHS
        },
    )


def _intervals(
    rows: Rows, axis: str, line: float | None, letters: int, *, is_offset: bool, is_change: bool
) -> tuple[dict[str, Any], int]:
    """What is drawn, and how many characters the longest line of its labels has. letters: at most so many."""
    label_of: dict[str, str] = {}
    for name in dict.fromkeys(str(each["name"]) for each in rows):
        label = _in_lines(name, letters)
        label_of[name] = f"{label} ({len(label_of) + 1})" if label in label_of.values() else label
    values = [
        {"series": 0, **each, "name": label_of[str(each["name"])], "said": shown(str(each["said"]))} for each in rows
    ]
    names = list(label_of.values())
    known = [number for each in values for number in (each["mean"], each["low"], each["high"]) if number is not None]
    domain = [min(0.0, *known), max(1.0, *known)] if known else [0, 1]
    if is_change:
        largest = max(map(abs, known), default=0) or 1
        domain = [-largest, largest]
    n_series = 1 + max((each.get("series", 0) for each in values), default=0)
    several = {"labelExpr": "split(datum.label, '\\n')", "labelLineHeight": LINE_HEIGHT}
    y = {"field": "name", "type": "nominal", "sort": names, "title": None, "axis": several}
    offset = {"yOffset": {"field": "series", "type": "ordinal"}} if n_series > 1 and is_offset else {}
    ends = {
        "x": {"field": "low", "type": "quantitative", "title": axis, "scale": {"domain": domain, "nice": True}},
        "x2": {"field": "high"},
    }
    layers: list[dict[str, Any]] = []
    if line is not None:
        layers.append({"mark": {"type": "rule", **_QUIET}, "encoding": {"x": {"datum": line}}})
    for number in range(n_series):
        of = {"transform": [{"filter": f"datum.series === {number}"}]}
        with_ends = {"transform": [{"filter": f"datum.series === {number} && datum.low !== null"}]}
        layers.append(
            {
                **with_ends,
                "mark": {"type": "rule", "color": colour(number), "strokeWidth": 2, "aria": False},
                "encoding": {"y": y, **offset, **ends},
            }
        )
        point = {"x": {"field": "mean", "type": "quantitative"}, "description": {"field": "said"}}
        mark = {"type": "point", "filled": True, "color": colour(number), "size": 64, "opacity": 1}
        layers.append({**of, "mark": mark, "encoding": {"y": y, **offset, **point}})
    n_lines = max((name.count("\n") + 1 for name in names), default=1)
    step = max(34 if offset else 26, n_lines * LINE_HEIGHT + 10)
    body = {"height": len(names) * step, "data": {"values": values}, "layer": layers}
    return body, max((len(part) for name in names for part in name.split("\n")), default=0)


def lines_chart(
    title: str, told: str, rows: Rows, axes: tuple[str, str], *, marked: Sequence[tuple[float, str]] = ()
) -> Chart:
    """A line with a band for each series over layers. rows: series (a name), layer, mean, low, high, said. marked: values of y that are marked."""
    series = list(dict.fromkeys(str(each["series"]) for each in rows))
    values = [{**each, "series": series.index(str(each["series"])), "said": shown(str(each["said"]))} for each in rows]
    known = [
        number for each in values for number in (each["mean"], each["low"], each["high"]) if number is not None
    ] + [value for value, _ in marked]
    room = 0.05 * ((max(known) - min(known)) or 1)
    scale = {"domain": [min(known) - room, max(known) + room], "nice": True, "zero": False}
    last = max(each["layer"] for each in values)
    x = {
        "field": "layer",
        "type": "quantitative",
        "title": axes[0],
        "axis": {"tickMinStep": 1, "format": "d", "grid": False},
        "scale": {"domain": [min(each["layer"] for each in values), max(last, 1)], "nice": False, "padding": 8},
    }
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "rule", **_QUIET, "strokeDash": dash}, "encoding": {"y": {"datum": value}}}
        for (value, _), dash in zip(marked, ([4, 3], [1, 0], [2, 2]), strict=False)
    ]
    for number in range(len(series)):
        only = f"datum.series === {number} && datum.mean !== null"
        band = {"type": "area", "color": colour(number), "opacity": 0.14, "aria": False, "line": False}
        ends = {
            "y": {"field": "low", "type": "quantitative", "scale": scale, "title": axes[1]},
            "y2": {"field": "high"},
        }
        layers.append(
            {"transform": [{"filter": f"{only} && datum.low !== null"}], "mark": band, "encoding": {"x": x, **ends}}
        )
        y = {"field": "mean", "type": "quantitative", "scale": scale, "title": axes[1]}
        line = {"type": "line", "color": colour(number), "strokeWidth": 2, "aria": False}
        layers.append({"transform": [{"filter": only}], "mark": line, "encoding": {"x": x, "y": y}})
        point = {"type": "point", "filled": True, "color": colour(number), "size": 46, "opacity": 1}
        said = {"description": {"field": "said"}}
        layers.append({"transform": [{"filter": only}], "mark": point, "encoding": {"x": x, "y": y, **said}})
    body = {"height": 260, "data": {"values": values}, "layer": layers}
    legend = [(f"series-{number % N_COLOURS}", name) for number, name in enumerate(series)]
    return Chart(title, told, {width: _drawn(body, 5, width) for width in WIDTHS}, legend)


_QUIET = {"color": "var(--quiet)", "strokeWidth": 1, "aria": False}
_SEPARATORS = {0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Of lines and paragraphs. They would end a string in an expression of Vega, where the names are sorted."""


def _in_lines(name: str, letters: int) -> str:
    """The name in lines: broken at blanks and underscores where it can be."""
    lines = [""]
    for part in re.findall(r"[^\s_]*[\s_]*", shown(name).translate(_SEPARATORS)):
        for piece in (part[at : at + letters] for at in range(0, len(part), letters)):
            if len(lines[-1] + piece.rstrip()) > letters:
                lines.append("")
            lines[-1] += piece
    kept = [each.strip() for each in lines if each.strip()][: MOST_LINES + 1] or [""]
    return "\n".join(
        kept if len(kept) <= MOST_LINES else [*kept[: MOST_LINES - 1], kept[MOST_LINES - 1][: letters - 1] + "…"]
    )


def _drawn(body: Mapping[str, Any], longest: int, width: str) -> str:
    """The SVG in a width. longest: how many characters the longest line of a label has."""
    import vl_convert

    spec = {
        **body,
        "width": WIDTHS[width] - 7 * longest - 30 - ROOM,
        "autosize": {"type": "pad"},
        "padding": {"left": ROOM, "right": 10, "top": 5, "bottom": 5},
        "config": _config(TICKS[width]),
    }
    return _harmless(vl_convert.vegalite_to_svg(spec))


def _config(n_ticks: int) -> dict[str, Any]:
    axis = {
        "labelColor": "var(--text-soft)",
        "titleColor": "var(--text-soft)",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelLimit": 0,
        "labelOverlap": True,
    }
    return {
        "background": None,
        "font": FONT,
        "axis": axis,
        "axisX": {"tickCount": n_ticks},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 8, "tickCount": 5},
        "view": {"stroke": None},
    }


def _harmless(svg: str) -> str:
    """The mark-up without what a page must not repeat or load: ids, links, and sizes, which the style sheet sets."""
    assert not re.search(r"<(script|foreignObject|a|image|style)[\s>]", svg), "a chart is text and lines"
    svg = re.sub(r' (id|style|xmlns:xlink)="[^"]*"', "", svg)
    return re.sub(r'<svg ([^>]*?)\swidth="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)

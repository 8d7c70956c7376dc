"""What figures share: the colours of lines, text, and files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from AutomaticEval.safe_text import shown
from AutomaticEval.sites import kind_and_layer

LINES = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
"""The colours of several lines in one panel."""


def label(text: str) -> str:
    """The text as matplotlib must get it: harmless, and with `$` escaped, which would begin a formula."""
    return shown(text).replace("$", r"\$")


def by_kind(places: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Kind of site -> (layer, place) of its places, by layer. places: mappings with `site`. A site that a model has once stands at -1 or behind all layers."""
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    sites = [kind_and_layer(each["site"]) for each in places]
    n_layers = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
    for (kind, layer), each in zip(sites, places, strict=True):
        once = -1 if kind == "embed" else n_layers
        found.setdefault(kind, []).append((once if layer is None else layer, each))
    return {kind: sorted(of, key=lambda pair: pair[0]) for kind, of in found.items()}


def by_stream(places: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """As `by_kind`, with the embeddings as the first point of resid_post's line, where that begins at layer 0."""
    found = by_kind(places)
    if "embed" in found and found.get("resid_post", [(-1, {})])[0][0] == 0:
        found["resid_post"] = found.pop("embed") + found["resid_post"]
    return found


def plain_log_ticks(axis: Any) -> None:
    """Give a logarithmic axis ticks at 1, 2 and 5 times powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def save(figure: Figure, path: str | Path | Any, dpi: float) -> None:
    """Write a figure: as SVG to a path that ends in .svg, else as PNG. The same figure gives the same bytes.

    The text of an SVG is text, which can be searched and edited, in a font of the viewer. Matplotlib's warnings of characters that the font lacks are left out.
    """
    is_svg = isinstance(path, str | Path) and Path(path).suffix == ".svg"
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "AutomaticEval", "svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph ")
        if is_svg:
            figure.savefig(path, dpi=dpi, format="svg", metadata={"Date": None})
        else:
            figure.savefig(path, dpi=dpi, format="png")

"""What figures share: the colours of lines, text, and files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from AutomaticEval.safe_text import shown

LINES = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
"""The colours of several lines in one panel."""


def label(text: str) -> str:
    """The text as matplotlib must get it: harmless, and with `$` escaped, which would begin a formula."""
    return shown(text).replace("$", r"\$")


def save(figure: Figure, path: str | Path | Any, dpi: float) -> None:
    """Write a figure as a PNG. Matplotlib's warnings of characters that the font lacks are left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")
        figure.savefig(path, dpi=dpi, format="png")

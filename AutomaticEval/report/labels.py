"""Text in figures, and figures as files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from AutomaticEval.safe_text import shown


def label(text: str) -> str:
    """As matplotlib takes it: `$` begins a formula."""
    return shown(text).replace("$", r"\$")


def save(figure: Figure, path: str | Path | Any, dpi: float) -> None:
    """As a PNG, without a word on characters that the font has not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")
        figure.savefig(path, dpi=dpi, format="png")

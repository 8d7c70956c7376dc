"""`Source`: a run, as its questions see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.row_array import RowArray


@dataclass(frozen=True)
class Source:
    """A run, as its questions see it."""

    path: Path
    contents: Contents
    """Of all its samples."""

    keys: Sequence[str]
    """The keys of its sites."""

    key: Callable[[str], str]
    """The stored key that a spelling of a site names."""

    rows: Callable[[str, Array], RowArray]
    """Gives rows of a site by their numbers."""

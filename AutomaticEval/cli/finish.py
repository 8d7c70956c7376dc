"""How a command that measures something ends: its result is written, drawn and printed.

Where the result goes is checked before the model loads, so that hours of work are not lost to a file that is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from AutomaticEval.cli.printing import print_table, say

if TYPE_CHECKING:
    from AutomaticEval.analysis.result import Result


class Table(NamedTuple):
    """What a person reads first of a result."""

    title: str
    columns: Sequence[str]
    rows: Iterable[Sequence[str]]
    n_words: int = 1
    """How many of the first columns are words."""


def result_file(folder: Path, name: str, kind: str, kept: Path | None = None, beside: Sequence[str] = ()) -> Path:
    """The file that a result of this kind will be written to. Raises PathExists when it or one of its figures is there.

    kept: where the command keeps its parts, for the message. beside: other files that it writes there.
    """
    from AutomaticEval.report.figures import names_of
    from AutomaticEval.store.disk.json_files import new_results

    file, *_ = new_results(folder, name, *names_of(kind), *beside, kept=kept)
    return file


def finish(
    file: Path, result: Result, *tables: Table, beside: Mapping[str, Callable[[Path], None]] = MappingProxyType({})
) -> None:
    """Print a result's tables, write it with its figures, and say where they are. beside: name of another file -> what writes it to a path."""
    from AutomaticEval.report.figures import save_with_figures

    for table in tables:
        print_table(*table)
    say_written(*save_with_figures(file, result.as_json(), beside))


def say_written(*files: Path) -> None:
    """Say which files were written."""
    say(f"Written:     {', '.join(map(str, files))}")

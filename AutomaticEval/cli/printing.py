"""Prints for all commands. Text stays text: neither markup in it nor control characters reach the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer

from AutomaticEval.errors import AutomaticEvalError
from AutomaticEval.safe_text import shown


def say(text: object, *, err: bool = False, is_grave: bool = False) -> None:
    """Print a line, or several, on standard output, or on the error stream; what is grave in red, at a terminal."""
    typer.secho(shown(str(text)), err=err, fg="red" if is_grave else None)


def end_bars() -> None:
    """End the lines of progress bars that an error left open, so that the next line begins at the left."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(tqdm._instances):
            bar.close()


def never_fail(*streams: Any) -> None:
    """Have streams spell out characters that their encoding does not have, where Python would end the command."""
    for stream in streams:
        with suppress(AttributeError, ValueError):  # not a text stream of Python's own
            stream.reconfigure(errors="backslashreplace")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], n_words: int = 1) -> None:
    """Print a table. n_words: how many of the first columns are words; the others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(shown(title)) if title else None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(Text(shown(name)), justify="right" if number >= n_words else "left")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    console = Console()
    wide = console if console.is_terminal else Console(width=140)  # for the whole table
    wide.print(table)


@contextmanager
def progress(what: str, total: Callable[[], int], *, of_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on the error stream, over bytes or samples. Gives a function that is told how many more are done."""
    with progress_of_work(what, of_bytes=of_bytes) as (advance, expect):
        with suppress(AutomaticEvalError):  # the work itself says what is wrong
            expect(total())
        yield advance


@contextmanager
def progress_of_work(
    what: str, *, of_bytes: bool = False
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """The same, for work that says itself how much there is: a function that is told how many more are done, and one that is told how many there will be."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = DownloadColumn(binary_units=True) if of_bytes else MofNCompleteColumn()
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda n: bar.advance(task, n), lambda n: bar.update(task, total=n)

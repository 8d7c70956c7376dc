"""A table as a pandas table, and which of its lines have the values that are asked for: of samples and of questions alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from AutomaticEval.errors import StoreError, did_you_mean
from AutomaticEval.store.contents.columns import Columns, Ordered
from AutomaticEval.store.ragged import Array

_BOOKKEEPING = ("shard", "index", "batch_rows", "batch_columns")
"""Columns that say how a run was made, and nothing about a sample."""


def pandas_table(columns: Columns) -> pd.DataFrame:
    """One row a sample, without the columns of bookkeeping."""
    names = [name for name in columns.names if name not in _BOOKKEEPING]
    return pd.DataFrame({name: _series(columns.whole(name)) for name in names})


def _series(values: list[Any]) -> Any:
    """A column of a pandas table. Text with lone surrogates, which Arrow does not hold, and numbers beyond 64 bits stay Python's own."""
    try:
        return pd.Series(values)
    except (UnicodeEncodeError, OverflowError):
        return pd.Series(values, dtype=object)


def column_of(columns: Columns, name: str, path: Path, why: str = "") -> list[Any]:
    """One column. path: of the run, for messages. Raises StoreError for a column that there is not; why: in place of a suggestion."""
    if name not in columns.names:
        raise StoreError(
            f"{path} has no column {name!r}.{why or did_you_mean(name, columns.names)} It has {', '.join(columns.names)}."
        )
    return columns.whole(name)


def selected(columns: Ordered, everything: Columns, path: Path, mask: Any, wanted: Mapping[str, Any]) -> Array:
    """[n], bool: the lines of a table that a mask takes, and whose columns have the wanted values.

    everything: the whole run's table, of which columns is a part. mask: a truth value for each line; None takes all.
    Raises StoreError for a column or a task that the run does not have, and for a mask of another length.
    """
    given = {name: list(value) if isinstance(value, Iterator) else value for name, value in wanted.items()}
    asked = {name: column_of(columns, name, path) for name in given}
    n_lines = len(columns.order)
    kept: Array = np.ones(n_lines, dtype=bool) if mask is None else np.array(mask, dtype=bool)
    if kept.shape != (n_lines,):
        raise StoreError(f"the mask has shape {kept.shape}; expected one truth value for each of {n_lines}.")
    for name, value in given.items():
        if name == "task":
            _refuse_unknown_tasks(value, everything, path)
        kept &= np.array([has_value(each, value) for each in asked[name]], dtype=bool)
    return kept


def _refuse_unknown_tasks(wanted: Any, everything: Columns, path: Path) -> None:
    """Raises StoreError for a task that no sample of the run has: a misspelled name would select nothing, and say nothing."""
    if callable(wanted):
        return
    known = list(dict.fromkeys(everything.whole("task")))
    for name in [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, Iterable) else []:
        if isinstance(name, str) and name not in known:
            tasks = [task for task in known if task]
            more = f" and {len(tasks) - 20} more" if len(tasks) > 20 else ""
            raise StoreError(
                f"{path} has no task {name!r}.{did_you_mean(name, tasks)} It has {', '.join(tasks[:20])}{more}."
            )


def whole_number(given: Any, name: str, instead: str) -> int:
    """The number of a line. name: of the lines, instead: what else people mean, for the message. Raises StoreError for what is no number."""
    try:
        return index(given)
    except TypeError:
        raise StoreError(f"{name} are numbered from 0, and {given!r} is no number: {instead}.") from None


def has_value(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one, or one of several. wanted may be a function, which is asked."""
    if callable(wanted):
        return bool(wanted(value))
    if hasattr(wanted, "tolist"):  # numpy, torch and pandas
        wanted = wanted.tolist()
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str | dict)
    return value in wanted if several else bool(value == wanted)

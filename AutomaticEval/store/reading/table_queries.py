"""The sample table as a pandas table, and which samples have the values that are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from AutomaticEval.store.contents.columns import Columns

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


def has_value(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one, or one of several. wanted may be a function, which is asked."""
    if callable(wanted):
        return bool(wanted(value))
    if hasattr(wanted, "tolist"):  # numpy, torch and pandas
        wanted = wanted.tolist()
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str | dict)
    return value in wanted if several else bool(value == wanted)

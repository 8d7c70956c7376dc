"""The sample table: for every sample its task, its prompt, its score and the other columns of `samples.COLUMNS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from AutomaticEval.store.ragged import Array


class Columns(Protocol):
    """A sample table, in memory or in files."""

    @property
    def names(self) -> list[str]: ...
    def whole(self, name: str) -> list[Any]:
        """A column's value for every sample, None where there is none."""

    def record(self, index: int) -> dict[str, Any]:
        """One sample's values."""


@dataclass(frozen=True)
class Listed:
    """A sample table in memory."""

    columns: Mapping[str, list[Any]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Listed:
        """records: one dict a sample. A sample without a column that another has gets None."""
        names = dict.fromkeys(name for record in records for name in record)
        return cls({name: [record.get(name) for record in records] for name in names})

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    def whole(self, name: str) -> list[Any]:
        return self.columns[name]

    def record(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


@dataclass(frozen=True)
class Ordered:
    """Another sample table in another order, or some samples of it. A column is read when it is asked for."""

    columns: Columns
    order: Array
    """[n_samples]: the number that each sample has in the other table."""

    @property
    def names(self) -> list[str]:
        return self.columns.names

    def whole(self, name: str) -> list[Any]:
        values = self.columns.whole(name)
        return [values[index] for index in self.order.tolist()]

    def record(self, index: int) -> dict[str, Any]:
        return self.columns.record(int(self.order[index]))


def listed(columns: Columns) -> Listed:
    """A table read into memory."""
    return Listed({name: columns.whole(name) for name in columns.names})


def records_of(columns: Columns) -> list[dict[str, Any]]:
    """The table as one dict a sample."""
    whole = {name: columns.whole(name) for name in columns.names}
    return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]

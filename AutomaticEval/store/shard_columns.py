"""The sample table over all shards of a run, in which each sample has the number of its shard and its index there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.ragged import Array


class ShardColumns:
    """The sample tables of several shards, one after the other, with the columns shard and index. A column is read when it is asked for."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards

    @property
    def names(self) -> list[str]:
        return [*dict.fromkeys(name for shard in self._shards for name in shard.column_names), "shard", "index"]

    def whole(self, name: str) -> list[Any]:
        if name == "shard":
            return [number for number, shard in enumerate(self._shards) for _ in range(shard.n_samples)]
        if name == "index":
            return [index for shard in self._shards for index in range(shard.n_samples)]
        return [value for shard in self._shards for value in shard.column(name)]

    def record(self, index: int) -> dict[str, Any]:
        return {name: self.whole(name)[index] for name in self.names}


def order_of(shards: Sequence[Contents], columns: Columns) -> Array:
    """[n_samples]: which sample each line of a table is, counted over all shards, by its shard and index.

    Raises ValueError for a line whose shard or index does not exist.
    """
    n_samples = np.array([0, *(shard.n_samples for shard in shards)])
    shard, index = (
        np.array([-1 if value is None else value for value in columns.whole(name)], dtype=np.int64)
        for name in ("shard", "index")
    )
    known = (shard >= 0) & (shard < len(shards)) & (index >= 0)
    strays = np.flatnonzero(~known | (index >= n_samples[np.where(known, shard + 1, 0)]))
    if len(strays):
        raise ValueError(f"sample {strays[0]} is in no shard")
    order: Array = np.cumsum(n_samples)[shard] + index
    return order

"""Writes `run.h5`, which shows all shards of a run as one, with the sample table of the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from AutomaticEval.errors import StoreError
from AutomaticEval.store.contents.changed import reordered
from AutomaticEval.store.contents.columns import Columns, Listed
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.hdf5.checksums import OF_ATTRIBUTES
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.hdf5.write import write_run
from AutomaticEval.store.hdf5.writing.activations import Source
from AutomaticEval.store.run_folder import INDEX
from AutomaticEval.store.shard_columns import order_of


def write_index(
    folder: Path, sources: Sequence[Source], shards: Sequence[Shard], columns: Columns, *, finished: bool
) -> dict[str, int]:
    """Write `run.h5` over shards. Returns how many numbers are infinite or NaN, in the form of `Source.non_finite`.

    sources: the same shards. columns: the sample table in the order wanted, with each sample's shard and index.
    """
    if not shards:
        raise StoreError(f"{folder} holds no shard: nothing was captured.")
    without_columns = [replace(shard.contents(), columns=Listed({})) for shard in shards]  # the table has the columns
    whole = joined(without_columns, shards[0].settings)
    ordered = reordered(whole, order_of(without_columns, columns), columns)
    return write_run(folder / INDEX, ordered, sources, finished=finished)


def source_of(shard: Shard) -> Source:
    """A shard as `run.h5` shows it."""
    stamp = shard.attributes.get(OF_ATTRIBUTES, "")
    return Source(shard.path.name, shard.n_rows, shard.size_bytes, stamp, shard.non_finite)

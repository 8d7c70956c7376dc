"""Tables as parquet files, written whole or not at all, and read again. The one module of the store that writes parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from AutomaticEval.errors import UnreadableFile

KIND = b"automatic-eval/kind"
SLAB_NUMBERS = 2**26
"""So many numbers of a column of lists are one piece: arrow counts them in 32 bits."""


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], kind: str) -> None:
    """Write columns of one length into a file, which its caller names when it is whole. kind: what the table is, for its reader.

    A column that is an array [n, width] is written as lists of its numbers, in its dtype. In all others NaN is written as no value.
    """
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({name: _column(values) for name, values in columns.items()})
    parquet.write_table(table.replace_schema_metadata({KIND: kind.encode()}), path, compression="zstd")


def _column(values: Any) -> Any:
    import pyarrow as pa

    if getattr(values, "ndim", 1) == 1:
        return pa.array(values, from_pandas=True)
    n, width = values.shape
    step = max(1, SLAB_NUMBERS // max(1, width))
    slabs = [values[start : start + step] for start in range(0, n, step)]
    offsets = [np.arange(len(slab) + 1, dtype=np.int32) * np.int32(width) for slab in slabs]
    lists = [
        pa.ListArray.from_arrays(pa.array(ends), pa.array(slab.reshape(-1)))
        for ends, slab in zip(offsets, slabs, strict=True)
    ]
    return pa.chunked_array(lists, type=pa.list_(pa.from_numpy_dtype(values.dtype)))


def read_parquet(path: Path, kind: str) -> pd.DataFrame:
    """The table in a file. Raises UnreadableFile for a file that is absent, no parquet, or of another kind."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except FileNotFoundError:
        raise UnreadableFile(f"there is no {path}.") from None
    except (pa.ArrowException, OSError, ValueError) as broken:
        raise UnreadableFile(f"{path} is no whole parquet file ({broken}).") from None
    found = (table.schema.metadata or {}).get(KIND)
    if found != kind.encode():
        raise UnreadableFile(f"{path} holds a table of another kind ({found and found.decode()}), not {kind}.")
    frame: pd.DataFrame = table.to_pandas()
    return frame

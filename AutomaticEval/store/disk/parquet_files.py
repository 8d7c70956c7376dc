"""Tables as parquet files, written whole or not at all, and read again. The one module of the store that writes parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from AutomaticEval.errors import UnreadableFile

KIND = b"automatic-eval/kind"


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], kind: str) -> None:
    """Write columns of one length into a file, which its caller names when it is whole. kind: what the table is, for its reader."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    parquet.write_table(table.replace_schema_metadata({KIND: kind.encode()}), path, compression="zstd")


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

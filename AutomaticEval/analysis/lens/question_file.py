"""The file of what the lens says of each question at each place: `lens_questions.parquet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from AutomaticEval.errors import StoreError
from AutomaticEval.store.disk.parquet_files import read_parquet, write_parquet

NAME = "lens_questions.parquet"
KIND = "lens_questions"


def write_lens_questions(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `LensResult.questions` to a path, which the caller names when it is whole."""
    write_parquet(path, columns, KIND)


def read_lens_questions(
    path: str | Path, *, task: str | None = None, doc_id: int | None = None, repeat: int | None = None
) -> Any:
    """What the lens says of each question at each place, as a pandas DataFrame: one line for each question and place, in the order of the run.

    path: a `lens_questions.parquet`, or the folder that has one. task, doc_id, repeat: only the lines of these. `docs/lens.md` lists the columns.
    Raises UnreadableFile for another file, StoreError for a question that it does not have.
    """
    path = Path(path).expanduser()
    table = read_parquet(path / NAME if path.is_dir() else path, KIND)
    wanted = {"task": task, "doc_id": doc_id, "repeat": repeat}
    asked = {name: value for name, value in wanted.items() if value is not None}
    for name, value in asked.items():
        table = table[table[name] == value]
    if asked and table.empty:
        raise StoreError(
            f"{path} has no question with {', '.join(f'{name}={value}' for name, value in asked.items())}."
        )
    return table.reset_index(drop=True)

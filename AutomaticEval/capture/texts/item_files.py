"""The items of a file, one after another: JSONL, JSON, CSV, TSV, parquet, or one text a line; each but parquet also packed with gzip.

An item is an object, or a text. Every reader of such files that people write stands here. What an item means, it does not know.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from AutomaticEval.errors import PromptError, first_line

FORMATS = "JSONL, JSON, CSV, TSV, parquet or txt"
PACKED = ".gz"
_GZIP = b"\x1f\x8b"
_PARQUET_ROWS = 1024


def items_in(path: Path, fields: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The place of each item, such as `line 3`, and the item. Of JSONL, empty lines are left out.

    fields: of a parquet file only these columns are read, if it has any of them.
    Raises PromptError for a file that is not there or of another format, and for one that is broken, with the place.
    """
    if not path.is_file():
        raise PromptError(f"no file {path}; give a {FORMATS} file.")
    ending = _ending(path)
    readers = {".txt": _txt, ".csv": _csv, ".json": _json, ".jsonl": _json, ".ndjson": _json}
    readers[".tsv"] = partial(_csv, delimiter="\t")
    readers[".parquet"] = partial(_parquet, fields=fields)
    if ending not in readers:
        raise PromptError(
            f"{path} ends in {path.suffix or 'nothing'!r}; give a {FORMATS} file, or a data set's folder."
        )
    yield from readers[ending](path)


def name_of(path: Path) -> str:
    """A file's name without its ending, and without that of gzip."""
    return Path(path.stem).stem if path.suffix.lower() == PACKED else path.stem


def _ending(path: Path) -> str:
    return (Path(path.stem) if path.suffix.lower() == PACKED else path).suffix.lower()


def _is_packed(path: Path) -> bool:
    if path.suffix.lower() == PACKED:
        return True
    with path.open("rb") as file:
        return file.read(2) == _GZIP


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file. Only newlines end a line, because JSON strings may hold the other characters that Python takes for an end.

    Raises PromptError for bytes that are not UTF-8, and for gzip that is broken or cut.
    """
    begins_at, number = 0, -1
    is_packed = _is_packed(path)
    try:
        with cast(BinaryIO, gzip.open(path) if is_packed else path.open("rb")) as file:
            for number, raw in enumerate(file):
                yield _decoded(raw, path, number, begins_at).removesuffix("\n")
                begins_at += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as broken:
        raise PromptError(
            f"{path} is no whole gzip file: it breaks off after line {number + 1} ({first_line(broken)}). Copy or pack it again."
        ) from None


def _decoded(raw: bytes, path: Path, number: int, begins_at: int) -> str:
    """A line as text. number: of the line, from 0. begins_at: its first byte."""
    try:
        return raw.decode("utf-8-sig" if number == 0 else "utf-8")
    except UnicodeDecodeError as broken:
        raise PromptError(
            f"{path}, line {number + 1}, is not UTF-8: byte {begins_at + broken.start} of the file."
        ) from None


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"line {number}", line.removesuffix("\r")) for number, line in enumerate(_lines(path), 1))


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    """For each row: the line in which it ends, and the row as an object. A field may stand in double quotes, in which a quote is doubled."""
    csv.field_size_limit(2**31 - 1)  # texts are long
    reader = csv.DictReader((f"{line}\n" for line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise PromptError(f"{path}, line {reader.line_num}: more fields than the first line names.")
            yield f"line {reader.line_num}", row
    except csv.Error as broken:
        kind = "CSV" if delimiter == "," else "TSV"
        begins = reader.line_num + 1  # a DictReader counts the lines of whole rows
        raise PromptError(f"{path}, line {begins}: the row that begins here is not {kind} ({broken}).") from None


def _parquet(path: Path, fields: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """The rows as objects, some at a time."""
    import pyarrow
    from pyarrow import parquet

    if _is_packed(path):
        raise PromptError(f"{path}: a parquet file is packed within, and is not read through gzip; unpack it.")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if fields is None or name in fields]
            for batch in file.iter_batches(_PARQUET_ROWS, columns=names or None):
                for item in batch.to_pylist():
                    number += 1
                    yield f"row {number}", item
    except (pyarrow.ArrowException, OSError, ValueError) as broken:
        raise PromptError(
            f"{path} is no whole parquet file: it cannot be read after row {number} ({first_line(broken)}). Copy or write it again."
        ) from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a list, or of JSON lines; the first character decides which."""
    first = next((line for line in _lines(path) if line.strip()), "")
    if first.lstrip().startswith("["):
        whole = _parsed("\n".join(_lines(path)), path, 1)
        yield from ((f"item {number}", item) for number, item in enumerate(whole, 1))
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as broken:
        raise PromptError(f"{path}, line {line + broken.lineno - 1}: not JSON ({broken.msg}).") from None
    except (ValueError, RecursionError) as broken:  # a number of thousands of digits; thousands of brackets
        raise PromptError(f"{path}, line {line}: JSON that cannot be read ({first_line(broken)}).") from None


def objects_with(names: Sequence[str], path: Path) -> Iterator[tuple[str, list[Any]]]:
    """For each item of a file: its place, for errors, and the values of the named fields of its object.

    Raises PromptError, which names the line, for an item that is not an object with these fields, and what items_in raises.
    """
    for within, item in items_in(path, names):
        place = f"{path}, {within}"
        try:
            values = [item[name] for name in names]
        except (KeyError, TypeError):
            raise PromptError(f"{place}: not an object with {', '.join(names[:-1])} and {names[-1]}.") from None
        yield place, values

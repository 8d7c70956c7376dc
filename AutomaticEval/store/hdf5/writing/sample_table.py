"""Writes text, and the columns of the sample table."""

from __future__ import annotations

from collections.abc import Sequence

import h5py
import numpy as np

from AutomaticEval.samples import COLUMNS, check_columns
from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.finite import NON_FINITE
from AutomaticEval.store.hdf5 import checksums
from AutomaticEval.store.hdf5.column_codec import encode_column, encode_text, n_non_finite_floats
from AutomaticEval.store.hdf5.contract import TEXT
from AutomaticEval.store.hdf5.writing.numbers import write_numbers


def write_text(file: h5py.File, name: str, values: Sequence[str]) -> None:
    """Write strings as one dataset, with their encoding and checksum."""
    texts, encoding = encode_text(values)
    _write_strings(file, name, texts, encoding)


def write_columns(file: h5py.File, columns: Columns) -> None:
    """Write `/samples`, one dataset a column. Raises CaptureError for a column that the format does not have, such as a newer version's."""
    check_columns(columns.names)
    group = file.require_group("samples")
    for name in COLUMNS:
        if name not in columns.names:
            continue
        values, encoding = encode_column(name, columns.whole(name))
        if encoding in ("utf-8", "json"):
            _write_strings(group, name, list(values), encoding)
            continue
        numbers = np.asarray(values)
        write_numbers(file, f"samples/{name}", numbers, numbers.dtype.str)
        group[name].attrs["encoding"] = encoding
        if encoding == "float":
            group[name].attrs[NON_FINITE] = n_non_finite_floats(numbers)


def _write_strings(group: h5py.Group, name: str, texts: Sequence[str], encoding: str) -> None:
    dataset = group.create_dataset(name, data=texts, dtype=TEXT, shape=(len(texts),), track_times=False)
    dataset.attrs["encoding"] = encoding
    dataset.attrs[checksums.NAME] = checksums.of_text(texts)

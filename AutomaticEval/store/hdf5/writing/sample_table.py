"""Writes text, and the columns of the sample table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from AutomaticEval.samples import COLUMNS, check_columns
from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.finite import NON_FINITE
from AutomaticEval.store.hdf5 import checksums
from AutomaticEval.store.hdf5.column_codec import encode_column, encode_lists, encode_text, n_non_finite_floats
from AutomaticEval.store.hdf5.contract import LISTS, TEXT, place_of_column
from AutomaticEval.store.hdf5.writing.numbers import write_numbers


def write_text(file: h5py.File, name: str, values: Sequence[str]) -> None:
    """Write strings as one dataset, with their encoding and checksum."""
    texts, encoding = encode_text(values)
    _write_strings(file, name, texts, encoding)


def write_columns(file: h5py.File, columns: Columns) -> None:
    """Write `/samples`, one dataset a column, and the groups of LISTS. Raises CaptureError for a column that the format does not have, such as a newer version's."""
    check_columns(columns.names)
    group = file.require_group("samples")
    for name in COLUMNS:
        if name not in columns.names:
            continue
        if name in LISTS:
            _write_lists(file, name, columns.whole(name))
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


def _write_lists(file: h5py.File, name: str, values: Sequence[Any]) -> None:
    """Write the numbers of each token, unless no sample has any."""
    lists = encode_lists(name, values)
    if not len(lists.values):
        return
    write_numbers(file, f"{name}/offset", lists.offset, "<i8")
    write_numbers(file, place_of_column(name), lists.values, "<f4")
    file[place_of_column(name)].attrs[NON_FINITE] = int(np.count_nonzero(~np.isfinite(lists.values)))


def _write_strings(group: h5py.Group, name: str, texts: Sequence[str], encoding: str) -> None:
    dataset = group.create_dataset(name, data=texts, dtype=TEXT, shape=(len(texts),), track_times=False)
    dataset.attrs["encoding"] = encoding
    dataset.attrs[checksums.NAME] = checksums.of_text(texts)

"""Writes the datasets of the sites: as numbers into a shard, or into `run.h5` as a view of the shards' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from AutomaticEval.store import int8
from AutomaticEval.store.contents.file_contents import Activation
from AutomaticEval.store.contents.slabs import resized
from AutomaticEval.store.finite import NON_FINITE, n_non_finite
from AutomaticEval.store.hdf5 import checksums
from AutomaticEval.store.hdf5.contract import hdf5_type
from AutomaticEval.store.hdf5.extents import load_filters
from AutomaticEval.store.hdf5.writing.numbers import write_checksums
from AutomaticEval.store.hdf5.writing.rows import Place, Written, write_rows

_SLAB_BYTES = 8 * 2**20
_CHUNK_BYTES = 512 * 2**10
"""Below the 1 MiB that older HDF5 libraries keep in memory for each dataset."""


class Source(NamedTuple):
    """A shard that `run.h5` shows."""

    name: str
    n_rows: int
    size_bytes: int
    stamp: str
    """The checksum of its root attributes, by which it is told from any other shard."""

    non_finite: Mapping[str, int]
    """Site or column -> how many of its numbers are infinite or NaN. Sites and columns of older files, which do not say it, are missing."""


def write_activations(
    file: h5py.File, group: str, activations: Mapping[str, Activation], n_rows: int, compression: str | None
) -> None:
    """Write one dataset a site into a group, as raw bits, and the checksums, which are computed on the way."""
    datasets = {
        key: _create(file, f"{group}/{key}", hdf5_type(each.dtype), (n_rows, each.width), compression)
        for key, each in activations.items()
    }
    places = [_place(datasets[key], key, each) for key, each in activations.items()]
    if compression is None:
        written = write_rows(Path(file.filename), places)
    else:
        written = [_compressed(datasets[place.key], place) for place in places]
    for place, found in zip(places, written, strict=True):
        dataset = datasets[place.key]
        dataset.attrs["dtype"] = str(place.activation.dtype).removeprefix("torch.")
        dataset.attrs[NON_FINITE] = found.n_non_finite
        write_checksums(dataset, found.hashed, place.block_rows)


def _place(dataset: h5py.Dataset, key: str, activation: Activation) -> Place:
    row_bytes = activation.width * dataset.id.get_type().get_size()
    rows = dataset.chunks[0] if dataset.chunks else checksums.rows_per_block(row_bytes)
    return Place(key, activation, dataset.id.get_offset() or 0, len(dataset), row_bytes, rows)


def _compressed(dataset: h5py.Dataset, place: Place) -> Written:
    """Write a dataset in chunks, which only HDF5 can do: a few whole chunks at a time."""
    hashed, n_wrong, at = checksums.ArrayHash(place.block_rows * place.row_bytes), 0, 0
    step = -(-max(1, _SLAB_BYTES // max(1, place.row_bytes)) // int8.BLOCK_ROWS) * int8.BLOCK_ROWS
    space = dataset.id.get_space()
    for slab in resized(place.activation.slabs(), step):
        values = np.ascontiguousarray(slab)
        space.select_hyperslab((at, 0), values.shape)
        dataset.id.write(h5py.h5s.create_simple(values.shape), space, values, mtype=dataset.id.get_type())
        hashed.add(values)
        n_wrong += n_non_finite(values, place.activation.dtype)
        at += len(values)
    assert at == place.n_rows, f"{place.key}: {at} rows came, expected {place.n_rows}"
    return Written(hashed, n_wrong)


def write_virtual(file: h5py.File, name: str, activation: Activation, sources: Sequence[Source]) -> None:
    """Write a dataset with its group and key as name, which shows the rows of all sources. Where a source is missing, HDF5 gives NaN (or the smallest whole number), never zeros."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_obj_track_times(False)
    absent = np.array(np.nan, np.float32)
    if not activation.dtype.is_floating_point:
        absent = np.array(torch.iinfo(activation.dtype).min, str(activation.dtype).removeprefix("torch."))
    settings.set_fill_value(absent)
    n_rows = sum(source.n_rows for source in sources)
    at = 0
    for source in sources:
        if source.n_rows:
            space = h5py.h5s.create_simple((n_rows, activation.width))
            space.select_hyperslab((at, 0), (source.n_rows, activation.width))
            theirs = h5py.h5s.create_simple((source.n_rows, activation.width))
            settings.set_virtual(space, source.name.encode(), f"/{name}".encode(), theirs)
            at += source.n_rows
    stored, space = hdf5_type(activation.dtype), h5py.h5s.create_simple((n_rows, activation.width))
    group, _, key = name.partition("/")
    dataset = h5py.Dataset(h5py.h5d.create(file.require_group(group).id, key.encode(), stored, space, dcpl=settings))
    dataset.attrs["dtype"] = str(activation.dtype).removeprefix("torch.")
    if all(key in source.non_finite for source in sources):
        dataset.attrs[NON_FINITE] = sum(source.non_finite[key] for source in sources)


def _create(
    file: h5py.File, name: str, stored: h5py.h5t.TypeID, shape: tuple[int, int], compression: str | None
) -> h5py.Dataset:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_obj_track_times(False)
    if all(shape):  # HDF5 refuses contiguous data without rows
        settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        if compression is None:
            settings.set_layout(h5py.h5d.CONTIGUOUS)
            settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        else:
            _compress(settings, shape, stored.get_size(), compression)
    group, _, own_name = name.rpartition("/")
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.require_group(group).id, own_name.encode(), stored, space, dcpl=settings))


def _compress(settings: Any, shape: tuple[int, int], item_bytes: int, compression: str) -> None:
    rows = max(1, _CHUNK_BYTES // (shape[1] * item_bytes))
    rows = 2 ** (min(rows, int8.BLOCK_ROWS).bit_length() - 1)  # divides the slabs that are written
    settings.set_chunk((min(rows, shape[0]), shape[1]))
    if item_bytes > 1:
        settings.set_shuffle()
    if compression == "gzip":
        settings.set_deflate(1)
        return
    plugin = load_filters("--compression", compression)
    chosen = plugin.Zstd(clevel=1) if compression == "zstd" else plugin.LZ4()
    settings.set_filter(chosen["compression"], h5py.h5z.FLAG_MANDATORY, chosen["compression_opts"])

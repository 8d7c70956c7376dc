"""Opens one file: checks its trailer and its attributes, and finds where one site lies in it.

Knows nothing of samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import torch

from AutomaticEval.errors import DamagedFile, NotActivations, StoreError, TruncatedFile, warn
from AutomaticEval.settings import RunSettings
from AutomaticEval.store.bits import bits_type
from AutomaticEval.store.disk.system import UNREAD, code_of
from AutomaticEval.store.hdf5 import contract, trailer
from AutomaticEval.store.hdf5.attributes import root_attributes, text_of
from AutomaticEval.store.hdf5.blocks import read_ranges, sums_of
from AutomaticEval.store.hdf5.extents import Extent, dataset_of, extent_of, naming
from AutomaticEval.store.hdf5.room import Room
from AutomaticEval.store.ragged import Array

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_said: set[tuple[Path, str]] = set()


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file, or say what it is instead. Raises UnreadableFile."""
    with naming(path), path.open("rb") as raw:
        head = raw.read(len(_SIGNATURE))
    if head != _SIGNATURE:
        empty = "it is empty" if not head else f"it begins with {head[:8]!r}"
        raise NotActivations(f"{path} is not an HDF5 file ({empty}); activations are saved as .h5.")
    try:
        file = h5py.File(path, "r")
    except OSError as failure:
        if code_of(failure) in UNREAD:
            with naming(path):
                raise
        raise TruncatedFile(
            f"{path} was cut short or damaged ({failure}); capture it again or restore a copy."
        ) from failure
    return file


class OpenedFile:
    """A shard, or a `run.h5`, whose trailer and attributes are right. Its datasets are not read.

    file_format: SHARD_FORMAT or RUN_FORMAT. check: check everything that is read against its checksums.
    Raises StoreError when there is no such file, and UnreadableFile.
    """

    def __init__(self, path: Path, file_format: str = contract.SHARD_FORMAT, *, check: bool = True) -> None:
        self.path, self.file_format, self._check = path, file_format, check
        if not path.is_file():
            raise StoreError(f"no file {path}.")
        with naming(path):
            self.has_trailer = trailer.is_there(path)
            if self.has_trailer and not trailer.is_right(path):  # HDF5 could loop for ever over it
                raise DamagedFile(
                    f"{path}: HDF5's structures, the text or the trailer are not what the trailer's checksum says; restore a copy."
                )
        with self.reading() as file:
            self.attributes, self.version, self.model, self.settings, self.replaces = root_attributes(
                path, file, file_format
            )
            self._status = path.stat()
            self.size_bytes = self._status.st_size
            self._room = Room(self.size_bytes)
            self._read(file)
        if check:
            self.warn_of_unchecked()

    @property
    def made_with(self) -> RunSettings:
        """`settings`, as fields."""
        return RunSettings.from_dict(self.settings)

    def _read(self, file: h5py.File) -> None:
        """Read what a subclass needs while the file is open."""

    def warn_of_unchecked(self) -> None:
        """Warn once for each file without a trailer, and once for each folder with files of an older version."""
        if self.version < (1, 1):
            what = f"{self.path.parent}: files of format 1.0 have no checksums: what is read of them is not checked."
        elif not self.has_trailer:
            what = (
                f"{self.path}: its trailer is missing: it was changed by another program, or damaged. Numbers are checked when "
                "they are read, text and structure are not; restore it from a copy."
            )
        elif self.version < (1, 2):
            what = (
                f"{self.path.parent}: files of format 1.1 have one checksum a dataset: a dataset that is read whole is checked, "
                "a part of a large one is not. `verify` checks all, and `merge` makes a copy that is checked at every read."
            )
        else:
            return
        if (self.path.parent, what) not in _said:
            _said.add((self.path.parent, what))
            warn(what)

    @contextmanager
    def reading(self) -> Iterator[h5py.File]:
        """The open file. What fails inside the with is raised with the file's path."""
        with naming(self.path), open_hdf5(self.path) as file:
            yield file

    def _site(self, file: h5py.File, key: str) -> tuple[torch.dtype, Extent]:
        """The dtype of a site, and where its rows lie in the file. For `run.h5`, whose rows are in the shards, only how many there are."""
        name = f"{contract.group_of(self.settings)}/{key}"
        dataset = dataset_of(file, name)
        dtype = contract.dtype_named(text_of(dataset, "dtype"))
        if dataset.ndim != 2 or dataset.id.get_type() != contract.hdf5_type(dtype):
            raise ValueError(f"/{name} has shape {dataset.shape} and {dataset.dtype}, expected rows of {dtype}")
        if self.file_format == contract.RUN_FORMAT:
            self._room.check_shape(name, dataset.shape)
            return dtype, Extent(name, None, dataset.shape, bits_type(dtype), ())
        return dtype, self._extent_of(file, dataset, name, bits_type(dtype), 2)

    def _extent(self, file: h5py.File, name: str, dtype: Any, n_dimensions: int = 1) -> Extent:
        return self._extent_of(file, dataset_of(file, name), name, dtype, n_dimensions)

    def _extent_of(self, file: h5py.File, dataset: h5py.Dataset, name: str, dtype: Any, n_dimensions: int) -> Extent:
        extent = extent_of(dataset, name, self._status, dtype, self._room, n_dimensions)
        return extent._replace(sums=sums_of(file, dataset, extent, self.version)) if self._check else extent


class OneSite(OpenedFile):
    """One site of a shard, for a caller that reads no other. The rest of the file is not looked at. int8 needs the whole `Shard`."""

    def __init__(self, path: Path, key: str, *, check: bool = True) -> None:
        self.key = key
        super().__init__(path, check=check)

    def _read(self, file: h5py.File) -> None:
        self.dtype, self.extent = self._site(file, self.key)

    def read_into(self, key: str, ranges: Array, out: Array) -> None:
        """Read rows of the site into out, [n, width], as raw bits."""
        assert key == self.key
        read_ranges(self.path, self.extent, ranges, out)

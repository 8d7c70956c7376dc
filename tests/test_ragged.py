"""Arrays that stay in files give what numpy gives for the same arrays in memory."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from AutomaticEval.store.hdf5.blocks import FileArray
from AutomaticEval.store.hdf5.extents import extent_of
from AutomaticEval.store.hdf5.room import Room
from AutomaticEval.store.ragged import Array, Chained, Ragged, chained

LENGTHS = (7, 0, 5, 1, 0, 20)


def in_file(path: Path, values: Array) -> FileArray:
    with h5py.File(path, "w") as file:
        file["rows/token_id"] = values
    with h5py.File(path, "r") as file:
        return FileArray(
            path, extent_of(file["rows/token_id"], "rows/token_id", path.stat(), "<i4", Room(path.stat().st_size))
        )


@pytest.fixture
def parts(tmp_path: Path) -> tuple[list[FileArray], Array]:
    """Arrays in files, some of them empty, and all their numbers."""
    whole = np.arange(100, 100 + sum(LENGTHS), dtype=np.int32)
    ends = np.cumsum(LENGTHS)[:-1]
    return [in_file(tmp_path / f"{number}.h5", each) for number, each in enumerate(np.split(whole, ends))], whole


def test_chained_files_are_sliced_and_picked_like_one_array(parts: tuple[list[FileArray], Array]) -> None:
    files, whole = parts
    found = chained(files)
    assert isinstance(found, Chained)
    assert len(found) == len(whole)
    for start in range(len(whole) + 1):
        for stop in range(len(whole) + 2):
            assert found[start:stop].tolist() == whole[start:stop].tolist()
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 50):
        at = rng.integers(0, len(whole), size)
        assert found[at].tolist() == whole[at].tolist()
    assert found[:].dtype == whole.dtype


def test_items_taken_from_files_are_those_taken_from_memory(parts: tuple[list[FileArray], Array]) -> None:
    """In any order, some of them, some twice; whole, by slice and by item."""
    files, whole = parts
    offset = np.array([0, 3, 3, 10, 11, 30, 33])
    rng = np.random.default_rng(0)
    for order in (np.arange(6), np.array([], dtype=int), np.array([1]), *(rng.integers(0, 6, size) for size in (3, 9))):
        lists = [whole[offset[number] : offset[number + 1]].tolist() for number in order]
        for values in (chained(files), whole):
            taken = Ragged(offset, values).take(order)
            assert [taken.item(number).tolist() for number in range(len(order))] == lists
            flat = [value for each in lists for value in each]
            assert taken.values[:].tolist() == flat
            for start, stop in rng.integers(0, len(flat) + 2, (20, 2)).tolist():
                assert taken.values[start:stop].tolist() == flat[start:stop]


def test_joined_items_are_renumbered(parts: tuple[list[FileArray], Array]) -> None:
    files, whole = parts
    joined = Ragged.joined([Ragged(np.array([0, 2, len(file)]), file) for file in (files[0], files[2], files[5])])
    expected = [whole[0:2], whole[2:7], whole[7:9], whole[9:12], whole[13:15], whole[15:33]]
    assert [joined.item(number).tolist() for number in range(6)] == [each.tolist() for each in expected]

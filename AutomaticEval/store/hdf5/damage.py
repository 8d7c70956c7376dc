"""Says what is wrong with one file: computes every checksum again, and compares every sample's rows with its tokens.

Reads without checks that raise, so that everything that is damaged is named. Knows nothing of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from AutomaticEval.errors import AutomaticEvalError, FileRefused, MissingFilter, NewerFormat, NotActivations
from AutomaticEval.samples import COLUMNS
from AutomaticEval.store import int8
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.thinking_in import ThinkingIn
from AutomaticEval.store.hdf5 import checksums, contract
from AutomaticEval.store.hdf5.attributes import attribute_of, text_of
from AutomaticEval.store.hdf5.blocks import read_ranges, stored_sums, sums_of
from AutomaticEval.store.hdf5.extents import Extent, dataset_of
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.hdf5.trailer import CHECKSUMS
from AutomaticEval.store.ragged import Array, indices_of

Advance = Callable[[int], None]
"""Called again and again while work goes on, with the number of bytes of activations that were done since the last call."""
_STEP_BYTES = 2**20
"""So many bytes are read at once: they stay in the processor's cache until they are hashed."""
_CHUNKED_BYTES = 2**23
"""So many bytes of a compressed dataset are read at once: they are read through HDF5, which opens the file for each step."""
_STEP_ROWS = 2**20
_NAMED = 5
"""So many damaged blocks of a dataset are named."""


def ignore(n_done: int) -> None:
    """The `advance` for work whose progress is not shown."""


def verify_file(path: Path, file_format: str = contract.SHARD_FORMAT, advance: Advance = ignore) -> list[str]:
    """What is wrong with a shard or `run.h5`, one line each; empty when all is well.

    file_format: SHARD_FORMAT or RUN_FORMAT. Raises MissingFilter, NewerFormat, NotActivations and FileRefused for a file that cannot be
    checked here, or that is no such file.
    """
    try:
        shard = Shard(path, file_format, check=False)
        _visit_everything(shard)
        problems = list(_wrong_checksums(shard, advance))
        if shard.has_rows and not shard.is_by_sample:
            problems += _wrong_rows(shard.contents())
        if shard.has_rows:
            problems += _wrong_thinking(shard.contents())
        if not shard.has_trailer and shard.version >= (1, 1):
            problems.append("its trailer is missing: it was changed or cut short")
        return [f"{path}: {problem}" for problem in problems]
    except (MissingFilter, NewerFormat, NotActivations, FileRefused):
        raise
    except AutomaticEvalError as failure:
        return [str(failure)]


def _visit_everything(shard: Shard) -> None:
    """Raises TruncatedFile when HDF5 does not find every object and attribute of the file."""

    def look(name: str, item: Any) -> None:
        for each in item.attrs:
            # another program's attribute may have any value; ours are checked where they are used
            with suppress(ValueError, TypeError):
                attribute_of(item, each)

    with shard.reading() as file:
        file.visititems(look)


def _wrong_checksums(shard: Shard, advance: Advance) -> Iterator[str]:
    """Datasets whose elements do not fit their checksums."""
    if shard.version < (1, 1):  # it had no checksums
        shard.warn_of_unchecked()
        return
    if checksums.of_attributes(shard.attributes) != shard.attributes.get(checksums.OF_ATTRIBUTES):
        yield "the root attributes are not what their checksum says"
    with shard.reading() as file:
        for name in _texts(shard, file):
            expected, computed = _checksum_of(file[name]), checksums.of_text(file[name][()].tolist())
            if computed != expected:
                yield _unlike(name, f"found {computed}, expected {expected}")
        numbers = [
            each._replace(sums=sums_of(file, dataset_of(file, each.name), each, shard.version))
            for each in _numbers(shard)
        ]
        stored = [_stored_checksums(file, each) for each in numbers]
    for extent, (whole, of_blocks) in zip(numbers, stored, strict=True):
        yield from _wrong_numbers(shard.path, extent, whole, of_blocks, advance)


def _texts(shard: Shard, file: h5py.File) -> list[str]:
    names = [f"samples/{name}" for name in shard.column_names if name in COLUMNS and name not in contract.LISTS]
    names += ["vocabulary/token"]
    names += [
        f"shards/{name}" for name in ("name", checksums.OF_ATTRIBUTES) if shard.file_format == contract.RUN_FORMAT
    ]
    return [name for name in names if h5py.check_string_dtype(file[name].dtype) is not None]


def _numbers(shard: Shard) -> list[Extent]:
    rows = shard.extents.values() if shard.file_format == contract.SHARD_FORMAT else ()
    columns = (extent for _, extent in shard.columns.values())
    return [*shard.numbers.values(), *shard.scales.values(), *shard.matrices.values(), *columns, *rows]


def _stored_checksums(file: h5py.File, extent: Extent) -> tuple[str | None, str | None]:
    """A dataset's checksum, and the checksum of its blocks' checksums; None for one that the file does not have."""
    blocks = f"{CHECKSUMS}/{extent.name}"
    has_blocks = extent.sums is not None and extent.sums.offset is not None
    return _checksum_of(file[extent.name]), _checksum_of(file[blocks]) if has_blocks else None


def _checksum_of(dataset: h5py.Dataset) -> str | None:
    """The checksum in a dataset's attribute, or None. Raises ValueError for an attribute that is no text."""
    return text_of(dataset, checksums.NAME) if checksums.NAME in dataset.attrs else None


def _wrong_numbers(
    path: Path, extent: Extent, whole: str | None, of_blocks: str | None, advance: Advance
) -> Iterator[str]:
    expected = stored_sums(path, extent)
    if expected is not None and checksums.of_numbers([expected]) != of_blocks:
        yield _unlike(f"{CHECKSUMS}/{extent.name}", f"expected {of_blocks}")
    hashed = _hashed(path, extent, advance)
    wrong = np.arange(0) if expected is None else np.flatnonzero(hashed.blocks() != expected)
    if len(wrong):
        assert extent.sums is not None
        yield _unlike(extent.name, _row_ranges(wrong, extent.sums.rows, extent.shape[0]))
    elif hashed.hexdigest() != whole:
        yield _unlike(extent.name, f"found {hashed.hexdigest()}, expected {whole}")


def _unlike(name: str, how: str) -> str:
    return f"/{name} is not what its checksum says ({how})"


def _row_ranges(blocks: Array, rows: int, n_rows: int) -> str:
    """The rows of blocks as text: 'rows 0 to 63, 128 to 191'. blocks: their numbers. rows: in a block. n_rows: in the dataset."""
    named = [f"{number * rows} to {min((number + 1) * rows, n_rows) - 1}" for number in blocks[:_NAMED].tolist()]
    return f"rows {', '.join(named)}" + (f" and {len(blocks) - _NAMED} more blocks" if len(blocks) > _NAMED else "")


def _hashed(path: Path, extent: Extent, advance: Advance) -> checksums.ArrayHash:
    """The checksums of all rows. The rows are read into one buffer, some at a time."""
    has_blocks = extent.sums is not None and not extent.sums.only_whole
    rows = extent.sums.rows if extent.sums is not None and has_blocks else int8.BLOCK_ROWS
    hashed = checksums.ArrayHash(rows * extent.row_bytes)
    step = max(1, (_CHUNKED_BYTES if extent.offset is None else _STEP_BYTES) // max(1, rows * extent.row_bytes)) * rows
    buffer = np.empty((min(step, extent.shape[0]), *extent.shape[1:]), extent.dtype)
    plain = extent._replace(sums=None)
    for start in range(0, extent.shape[0], step):
        slab = buffer[: min(step, extent.shape[0] - start)]
        read_ranges(path, plain, [(start, start + len(slab))], slab)
        hashed.add(slab)
        if contract.holds_sites(extent.name):
            advance(slab.nbytes)
    return hashed


def _wrong_rows(contents: Contents) -> list[str]:
    """The first sample with a row whose token is not the sample's token at the row's position."""
    token_ids, positions, ranges = (
        contents.token_ids[:],
        contents.positions[:],
        contents.segments.values[:].reshape(-1, 2),
    )
    prompts, responses = (ragged.values[:] for ragged in (contents.input_ids, contents.generated_ids))
    owner = np.repeat(np.arange(contents.n_samples), np.diff(contents.segments.offset))
    n_rows = np.cumsum(ranges[:, 1] - ranges[:, 0])
    for start, stop in _steps(n_rows):
        some = ranges[start:stop]
        rows, of = indices_of(some), np.repeat(owner[start:stop], some[:, 1] - some[:, 0])
        at_positions, n_prompt = positions[rows], np.diff(contents.input_ids.offset)[of]
        n_fed = n_prompt + np.maximum(np.diff(contents.generated_ids.offset)[of] - 1, 0)
        wrong = (at_positions < 0) | (at_positions >= n_fed)
        for ids, at, here in (
            (prompts, contents.input_ids.offset[of] + at_positions, ~wrong & (at_positions < n_prompt)),
            (
                responses,
                contents.generated_ids.offset[of] + at_positions - n_prompt,
                ~wrong & (at_positions >= n_prompt),
            ),
        ):
            wrong[here] = ids[at[here]] != token_ids[rows[here]]
        if wrong.any():
            return [f"the rows of sample {of[wrong][0]} are not its tokens"]
    return []


def _wrong_thinking(contents: Contents) -> list[str]:
    """The first sample whose thinking or answer is said to be where its response is not."""
    thinking = ThinkingIn(contents)
    problems = (thinking.problem(number) for number in range(contents.n_samples))
    return [each for each in problems if each is not None][:1]


def _steps(ends: Array) -> Iterator[tuple[int, int]]:
    """Half-open ranges of segments, each range with about _STEP_ROWS rows. ends: for each segment the number of rows up to its end."""
    at = 0
    while at < len(ends):
        done = ends[at - 1] if at else 0
        stop = max(at + 1, int(np.searchsorted(ends, done + _STEP_ROWS, "right")))
        yield at, stop
        at = stop

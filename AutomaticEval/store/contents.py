"""What one file holds, column by column: made of samples in memory, or read from files, joined, cut and reordered.

Activations come piece by piece and are never gathered. Knows nothing of HDF5.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from AutomaticEval.errors import CaptureError
from AutomaticEval.samples import Rows, Sample
from AutomaticEval.store import int8 as eight_bits
from AutomaticEval.store.hdf5.contract import bits, bits_type, from_bits
from AutomaticEval.store.ragged import Array, Ragged, chained, gathered, ranges_of, rechunked


class Columns(Protocol):
    """The sample table."""

    @property
    def names(self) -> list[str]: ...
    def whole(self, name: str) -> list[Any]:
        """A column's value for every sample, None where there is none."""

    def record(self, index: int) -> dict[str, Any]:
        """One sample's values."""


@dataclass(frozen=True)
class Listed:
    """A sample table in memory."""

    columns: Mapping[str, list[Any]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Listed:
        names = dict.fromkeys(name for record in records for name in record)
        return cls({name: [record.get(name) for record in records] for name in names})

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    def whole(self, name: str) -> list[Any]:
        return self.columns[name]

    def record(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


@dataclass(frozen=True)
class Ordered:
    """A sample table in another order, or some of its samples; a column is read when it is asked for."""

    columns: Columns
    order: Array

    @property
    def names(self) -> list[str]:
        return self.columns.names

    def whole(self, name: str) -> list[Any]:
        values = self.columns.whole(name)
        return [values[index] for index in self.order.tolist()]

    def record(self, index: int) -> dict[str, Any]:
        return self.columns.record(int(self.order[index]))


def listed(columns: Columns) -> Listed:
    """A table read into memory."""
    return Listed({name: columns.whole(name) for name in columns.names})


def records_of(columns: Columns) -> list[dict[str, Any]]:
    """The table, one dict a sample."""
    whole = {name: columns.whole(name) for name in columns.names}
    return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]


@dataclass(frozen=True)
class Activation:
    """The rows of one site."""

    dtype: torch.dtype
    """As they are stored; int8 has scales."""

    width: int
    pieces: Callable[[], Iterator[Array]]
    """Raw bits, [n, width] each, all rows in order."""

    scales: Callable[[], Iterator[Array]] | None = None
    """For int8: float32, [n, width] each, one line a block."""


@dataclass(frozen=True)
class Contents:
    """One file's worth of samples with their rows."""

    model: str
    settings: Mapping[str, Any]
    token_ids: Any
    """[n_rows], an array or what is sliced like one; so are the next two."""

    positions: Any
    blocks: Any
    """Each row's line in the scales; None without int8 activations."""

    segments: Ragged
    """[n_segments, 2]: each sample's half-open ranges of rows."""

    input_ids: Ragged
    generated_ids: Ragged
    strings: Callable[[], Mapping[int, str]]
    """The token strings of every id that a row has."""

    columns: Columns
    activations: Mapping[str, Activation]

    @property
    def n_samples(self) -> int:
        return len(self.segments.offset) - 1

    @property
    def n_rows(self) -> int:
        return len(self.token_ids)


def of_samples(
    samples: Sequence[Sample], model: str, settings: Mapping[str, Any], *, in_8_bits: bool = False
) -> Contents:
    """Samples in memory; rows that several of them share are there once. Raises CaptureError."""
    blocks = list({id(part.rows): part.rows for sample in samples for part in sample.parts}.values())
    _check_alike(blocks)
    ends = np.cumsum([0, *(len(rows.positions) for rows in blocks)])
    first = {id(rows): int(end) for rows, end in zip(blocks, ends, strict=False)}
    places = [[np.asarray(where, np.int64) + first[id(rows)] for rows, where in sample.parts] for sample in samples]
    strings: dict[int, str] = {}
    for rows in blocks:
        strings.update(zip(rows.token_ids, rows.tokens, strict=True))
    keys = blocks[0].activations if blocks else ()
    return Contents(
        model,
        settings,
        _flat([rows.token_ids for rows in blocks]),
        _flat([rows.positions for rows in blocks]),
        np.arange(ends[-1], dtype=np.int32) // eight_bits.BLOCK_ROWS if in_8_bits else None,
        _segments(places),
        Ragged.of([sample.input_ids for sample in samples]),
        Ragged.of([sample.generated_ids for sample in samples]),
        lambda: strings,
        Listed.of([sample.fields for sample in samples]),
        {key: _in_memory([rows.activations[key] for rows in blocks], in_8_bits=in_8_bits) for key in keys},
    )


def _flat(lists: Sequence[Sequence[int]]) -> Array:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, sum(map(len, lists)))


def _segments(places: Sequence[Sequence[Array]]) -> Ragged:
    """places: for each sample the numbers of its rows, part by part."""
    lengths = [sum(map(len, parts)) for parts in places]
    numbers = np.concatenate([np.arange(0), *(part for parts in places for part in parts)])
    owner = np.repeat(np.arange(len(places)), lengths)
    begins = np.ones(len(numbers), dtype=bool)
    begins[1:] = (np.diff(numbers) != 1) | (np.diff(owner) != 0)
    at = np.flatnonzero(begins)
    ranges = (
        np.column_stack([numbers[at], numbers[[*at[1:] - 1, len(numbers) - 1]] + 1])
        if len(at)
        else np.empty((0, 2), np.int64)
    )
    return Ragged(np.searchsorted(owner[at], np.arange(len(places) + 1)), ranges)


def _check_alike(blocks: Sequence[Rows]) -> None:
    kinds = {key: (tensor.dtype, tensor.shape[1]) for key, tensor in blocks[0].activations.items()} if blocks else {}
    for block in blocks:
        n_rows = len(block.positions)
        if (
            len(block.token_ids) != n_rows
            or block.activations.keys() != kinds.keys()
            or any(
                (rows.dtype, rows.shape[1]) != kinds[key] or rows.shape[0] != n_rows
                for key, rows in block.activations.items()
            )
        ):
            raise CaptureError("rows of different sites, dtypes, widths or lengths cannot be stored in one file.")


def _in_memory(tensors: Sequence[torch.Tensor], *, in_8_bits: bool) -> Activation:
    dtype, width = tensors[0].dtype, tensors[0].shape[1]
    if not in_8_bits:
        return Activation(dtype, width, lambda: gathered(map(bits, tensors)))

    def blocks() -> Iterator[Array]:
        return rechunked((tensor.float().numpy() for tensor in tensors), eight_bits.BLOCK_ROWS)

    return Activation(
        torch.int8,
        width,
        lambda: map(eight_bits.quantized, blocks()),
        lambda: map(eight_bits.scales_of, blocks()),
    )


def joined(parts: Sequence[Contents], settings: Mapping[str, Any] | None = None) -> Contents:
    """The samples of all parts, one part after the other; they must have the same sites. Raises CaptureError."""
    kinds = [{key: (each.dtype, each.width) for key, each in part.activations.items()} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise CaptureError("activations of different sites, dtypes or widths cannot be joined.")
    starts = np.cumsum([0, *(part.n_rows for part in parts)])
    segments = [
        part.segments._replace(values=part.segments.values[:] + start)
        for part, start in zip(parts, starts, strict=False)
    ]
    return Contents(
        parts[0].model,
        parts[0].settings if settings is None else settings,
        chained([part.token_ids for part in parts]),
        chained([part.positions for part in parts]),
        _joined_blocks(parts),
        Ragged.joined(segments),
        Ragged.joined([part.input_ids for part in parts]),
        Ragged.joined([part.generated_ids for part in parts]),
        lambda: {token: text for part in parts for token, text in part.strings().items()},
        joined_columns(parts),
        {key: _joined_activation([part.activations[key] for part in parts]) for key in parts[0].activations},
    )


def joined_columns(parts: Sequence[Contents]) -> Listed:
    """One sample table, one part after the other; None where a part lacks a column."""
    names = dict.fromkeys(name for part in parts for name in part.columns.names)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for part in parts:
        for name, values in found.items():
            values += part.columns.whole(name) if name in part.columns.names else [None] * part.n_samples
    return Listed(found)


def _joined_activation(each: Sequence[Activation]) -> Activation:
    def pieces() -> Iterator[Array]:
        for one in each:
            yield from one.pieces()

    def scales() -> Iterator[Array]:
        for one in each:
            assert one.scales is not None
            yield from one.scales()

    first = each[0]
    return Activation(first.dtype, first.width, pieces, None if first.scales is None else scales)


def _joined_blocks(parts: Sequence[Contents]) -> Array | None:
    if all(part.blocks is None for part in parts):
        return None
    found, at = [], 0
    for part in parts:
        blocks = part.blocks[:]
        found.append(blocks + np.int32(at))
        scaled = next(each.scales for each in part.activations.values() if each.scales is not None)
        at += sum(map(len, scaled()))
    return np.concatenate(found)


def reordered(contents: Contents, order: Array, columns: Columns | None = None) -> Contents:
    """The samples in another order, or some of them; all rows stay. columns: other columns, in the new order."""
    return replace(
        contents,
        segments=contents.segments.take(order),
        input_ids=contents.input_ids.take(order),
        generated_ids=contents.generated_ids.take(order),
        columns=columns or Ordered(contents.columns, order),
    )


def cut(contents: Contents, kept: Sequence[Array], keys: Sequence[str]) -> Contents:
    """Only some sites, and of each sample only some rows; rows that no sample keeps are gone.

    kept: for each sample the rows (numbers in contents) that it keeps, in order. keys: the sites.
    """
    wanted = np.zeros(contents.n_rows, dtype=bool)
    for rows in kept:
        wanted[rows] = True
    renumbered = np.cumsum(wanted) - 1
    token_ids = contents.token_ids[:][wanted]
    alive = set(token_ids.tolist())
    return replace(
        contents,
        token_ids=token_ids,
        positions=contents.positions[:][wanted],
        blocks=None if contents.blocks is None else contents.blocks[:][wanted],
        segments=Ragged.of([ranges_of(renumbered[rows]) for rows in kept], (2,)),
        strings=lambda: {token: text for token, text in contents.strings().items() if token in alive},
        activations={key: _cut_activation(contents.activations[key], wanted) for key in keys},
    )


def _cut_activation(activation: Activation, wanted: Array) -> Activation:
    def pieces() -> Iterator[Array]:
        at = 0
        for piece in activation.pieces():
            yield piece[wanted[at : at + len(piece)]]
            at += len(piece)

    return replace(activation, pieces=pieces)


def converted(contents: Contents, dtype: torch.dtype) -> Contents:
    """The activations in another floating dtype. Raises CaptureError when one does not fit into it."""
    changed = {key: _converted(key, each, contents.blocks, dtype) for key, each in contents.activations.items()}
    return replace(contents, blocks=None, activations=changed)


def _converted(key: str, activation: Activation, blocks: Any, dtype: torch.dtype) -> Activation:
    def pieces() -> Iterator[Array]:
        none = np.empty((0, activation.width), np.float32)
        scales = None if activation.scales is None else np.concatenate([none, *activation.scales()])
        at = 0
        for piece in activation.pieces():
            lines = None if scales is None else scales[blocks[at : at + len(piece)]]
            yield bits(narrowed(key, floats(piece, activation.dtype, lines), dtype))
            at += len(piece)

    return activation if activation.dtype == dtype else Activation(dtype, activation.width, pieces)


def floats(raw: Array, dtype: torch.dtype, scales: Array | None) -> torch.Tensor:
    """Raw bits [n, width] as the numbers that they stand for. scales: each row's, for int8, which gives float32."""
    if dtype == torch.int8:
        assert scales is not None
        return torch.from_numpy(eight_bits.restored(raw, scales))
    return from_bits(np.ascontiguousarray(raw, dtype=bits_type(dtype)), dtype)


def narrowed(key: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values in another dtype. Raises CaptureError when a finite value becomes infinite."""
    found = values.to(dtype)
    if torch.promote_types(values.dtype, dtype) == dtype:  # it holds them all
        return found
    lost = found.isinf() & values.isfinite()
    if lost.any():
        raise CaptureError(
            f"{key} holds {float(values[lost].abs().max()):.4g}, which {str(dtype).removeprefix('torch.')} cannot hold; "
            "store it as bfloat16 or float32."
        )
    return found

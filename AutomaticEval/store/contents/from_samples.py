"""Samples in memory -> the contents of one file, in which rows that several samples share are there once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from AutomaticEval.errors import CaptureError
from AutomaticEval.reducing.table import is_by_sample
from AutomaticEval.samples import Line, Rows, Sample
from AutomaticEval.store import int8
from AutomaticEval.store.bits import bits
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.contents.file_contents import Activation, Contents
from AutomaticEval.store.contents.slabs import gathered, resized
from AutomaticEval.store.ragged import Array, Ragged


def of_samples(
    samples: Sequence[Sample],
    model: str,
    settings: Mapping[str, Any],
    *,
    in_8_bits: bool = False,
    matrices: Mapping[str, Any] = {},
) -> Contents:
    """The contents of a file with these samples. Raises CaptureError for rows that cannot be stored in one file.

    matrices: those of the projection by which the rows were made: name -> [width, k].
    """
    every_rows = distinct_rows(samples)
    _check_alike(every_rows)
    if any(isinstance(rows, Line) != is_by_sample(settings.get("reduce")) for rows in every_rows):
        raise CaptureError(
            f"lines of samples go with the setting reduce, and rows of tokens do not; it is {settings.get('reduce')!r}."
        )
    ends = np.cumsum([0, *(len(rows.positions) for rows in every_rows)])
    first = {id(rows): int(end) for rows, end in zip(every_rows, ends, strict=False)}
    numbers = [[np.asarray(where, np.int64) + first[id(rows)] for rows, where in sample.parts] for sample in samples]
    strings: dict[int, str] = {}
    for rows in every_rows:
        strings.update(zip(rows.token_ids, rows.tokens, strict=True))
    first_rows = every_rows[0].activations if every_rows else {}
    in_8_bits = in_8_bits and (not first_rows or any(each.is_floating_point() for each in first_rows.values()))
    return Contents(
        model=model,
        settings=settings,
        token_ids=_flat([rows.token_ids for rows in every_rows]),
        positions=_flat([rows.positions for rows in every_rows]),
        blocks=np.arange(ends[-1], dtype=np.int32) // int8.BLOCK_ROWS if in_8_bits else None,
        segments=_segments(numbers),
        input_ids=Ragged.of([sample.input_ids for sample in samples]),
        generated_ids=Ragged.of([sample.generated_ids for sample in samples]),
        strings=lambda: strings,
        columns=Listed.of([sample.fields for sample in samples]),
        activations={
            key: _in_memory([rows.activations[key] for rows in every_rows], in_8_bits=in_8_bits) for key in first_rows
        },
        matrices={name: np.asarray(matrix) for name, matrix in matrices.items()},
    )


def distinct_rows(samples: Sequence[Sample]) -> list[Rows]:
    """The Rows that samples point into, each once, in the order of their first sample."""
    return list({id(part.rows): part.rows for sample in samples for part in sample.parts}.values())


def _flat(lists: Sequence[Sequence[int]]) -> Array:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, sum(map(len, lists)))


def _segments(numbers: Sequence[Sequence[Array]]) -> Ragged:
    """The ranges of each sample's rows. numbers: for each sample the numbers of its rows in the file, an array a part."""
    lengths = [sum(map(len, parts)) for parts in numbers]
    flat = np.concatenate([np.arange(0), *(part for parts in numbers for part in parts)])
    owner = np.repeat(np.arange(len(numbers)), lengths)
    begins = np.ones(len(flat), dtype=bool)
    begins[1:] = (np.diff(flat) != 1) | (np.diff(owner) != 0)
    at = np.flatnonzero(begins)
    last = [*at[1:] - 1, len(flat) - 1] if len(at) else []
    ranges = np.column_stack([flat[at], flat[last] + 1]) if len(at) else np.empty((0, 2), np.int64)
    return Ragged(np.searchsorted(owner[at], np.arange(len(numbers) + 1)), ranges)


def _check_alike(every_rows: Sequence[Rows]) -> None:
    if any(rows.formats != every_rows[0].formats or len(rows.token_ids) != len(rows.positions) for rows in every_rows):
        raise CaptureError("rows of different sites, dtypes, widths or lengths cannot be stored in one file.")


def _in_memory(tensors: Sequence[torch.Tensor], *, in_8_bits: bool) -> Activation:
    """One site of all Rows, [n_rows, width] each."""
    dtype, width = tensors[0].dtype, tensors[0].shape[1]
    if not in_8_bits or not dtype.is_floating_point:  # ids stay as they are
        return Activation(dtype, width, lambda: map(bits, gathered(tensors)))

    def blocks() -> Iterator[Array]:
        return resized((tensor.float().numpy() for tensor in tensors), int8.BLOCK_ROWS)

    return Activation(torch.int8, width, lambda: map(int8.quantized, blocks()), lambda: map(int8.scales_of, blocks()))

"""What the formats with a file a shard share: the tensors of a shard, and `samples.jsonl`, which says where the rows of a sample are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from AutomaticEval.store.contents.changed import converted
from AutomaticEval.store.export.outgoing import Advance, records
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.run import Run


class OutgoingTensor(NamedTuple):
    """One tensor that is written into a file of another tool."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    slabs: Callable[[], Iterable[Array]]
    """Gives its raw bits in order, some rows at a time."""

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


Save = Callable[[Path, Sequence[OutgoingTensor]], None]
"""Writes tensors into a file."""


def write_shards(
    suffix: str, save: Save, run: Run, folder: Path, dtypes: Mapping[str, torch.dtype], advance: Advance
) -> None:
    """Write a file for each shard, and samples.jsonl."""
    names = [f"shard-{number:05d}.{suffix}" for number in range(len(run.shards))]
    first = np.cumsum([0, *(shard.n_rows for shard in run.shards)])
    segments = run.contents.segments
    with (folder / "samples.jsonl").open("w", encoding="ascii") as lines:
        for number, record in enumerate(records(run)):
            ranges = ranges_in_shards(segments.item(number), first)
            rows = [[names[shard], start, stop] for shard, start, stop in ranges]
            lines.write(json.dumps({**record, "rows": rows}) + "\n")
    for name, shard in zip(names, run.shards, strict=True):
        save(folder / name, _tensors(shard, dtypes))
        advance(shard.n_samples)


def ranges_in_shards(ranges: Array, first: Array) -> Iterator[tuple[int, int, int]]:
    """(shard, start, stop) for each part of half-open ranges that lies in one shard, counted in that shard.

    ranges: [n, 2], counted over the run. first: [n_shards + 1], the number of each shard's first row.
    """
    for start, stop in ranges.tolist():
        while start < stop:
            shard = int(np.searchsorted(first, start, side="right")) - 1
            end = min(stop, int(first[shard + 1]))
            yield shard, start - int(first[shard]), end - int(first[shard])
            start = end


def _tensors(shard: Shard, dtypes: Mapping[str, torch.dtype]) -> list[OutgoingTensor]:
    contents, tensors = shard.contents(), []
    for key, each in contents.activations.items():
        changed = converted(replace(contents, activations={key: each}), dtypes[key]).activations[key]
        tensors.append(OutgoingTensor(key, changed.dtype, (contents.n_rows, each.width), changed.slabs))
    if contents.is_by_sample:  # a line is no token's
        return tensors
    numbers = {"token_id": contents.token_ids[:], "position": contents.positions[:]}
    return tensors + [
        OutgoingTensor(name, torch.int32, (contents.n_rows,), partial(iter, [v])) for name, v in numbers.items()
    ]

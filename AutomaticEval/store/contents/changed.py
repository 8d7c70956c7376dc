"""The contents of a file with its samples in another order, with fewer rows or sites, or in another dtype.

Nothing is read or computed before the changed contents are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from AutomaticEval.errors import CaptureError
from AutomaticEval.samples import IDS
from AutomaticEval.store import int8
from AutomaticEval.store.bits import bits, bits_type, from_bits
from AutomaticEval.store.contents.columns import Columns, Ordered
from AutomaticEval.store.contents.file_contents import Activation, Contents
from AutomaticEval.store.ragged import Array, Ragged, ranges_of


def reordered(contents: Contents, order: Array, columns: Columns | None = None) -> Contents:
    """The samples in another order, or some of them; all rows stay. columns: another sample table, in the new order."""
    return replace(
        contents,
        segments=contents.segments.take(order),
        input_ids=contents.input_ids.take(order),
        generated_ids=contents.generated_ids.take(order),
        columns=columns or Ordered(contents.columns, order),
    )


def cut(contents: Contents, kept: Sequence[Array], keys: Sequence[str]) -> Contents:
    """Some sites, and some rows of each sample; rows that no sample keeps are gone.

    kept: for each sample the numbers of the rows that it keeps, in order. keys: the sites.
    """
    is_kept = np.zeros(contents.n_rows, dtype=bool)
    for rows in kept:
        is_kept[rows] = True
    renumbered = np.cumsum(is_kept) - 1
    token_ids = contents.token_ids[:][is_kept]
    alive = set(token_ids.tolist())
    return replace(
        contents,
        token_ids=token_ids,
        positions=contents.positions[:][is_kept],
        blocks=None if contents.blocks is None else contents.blocks[:][is_kept],
        segments=Ragged.of([ranges_of(renumbered[rows]) for rows in kept], (2,)),
        strings=lambda: {token: text for token, text in contents.strings().items() if token in alive},
        activations={key: _cut_activation(contents.activations[key], is_kept) for key in keys},
    )


def _cut_activation(activation: Activation, is_kept: Array) -> Activation:
    def slabs() -> Iterator[Array]:
        at = 0
        for slab in activation.slabs():
            yield slab[is_kept[at : at + len(slab)]]
            at += len(slab)

    return replace(activation, slabs=slabs)


def without_rows(contents: Contents) -> Contents:
    """The tables of a file whose samples have lines: no rows, and no segments of them."""
    none = np.empty(0, np.int32)
    segments = Ragged(np.zeros(contents.n_samples + 1, np.int64), np.empty((0, 2), np.int64))
    return replace(contents, token_ids=none, positions=none, segments=segments, strings=dict)


def converted(contents: Contents, dtype: torch.dtype) -> Contents:
    """The activations in another floating dtype; ids stay. Reading them raises CaptureError when a number does not fit into it."""
    changed = {key: _converted(key, each, contents.blocks, dtype) for key, each in contents.activations.items()}
    return replace(contents, blocks=None, activations=changed)


def _converted(key: str, activation: Activation, blocks: Any, dtype: torch.dtype) -> Activation:
    def slabs() -> Iterator[Array]:
        none = np.empty((0, activation.width), np.float32)
        scales = None if activation.scales is None else np.concatenate([none, *activation.scales()])
        at = 0
        for slab in activation.slabs():
            lines = None if scales is None else scales[blocks[at : at + len(slab)]]
            yield bits(narrowed(key, _numbers(slab, activation.dtype, lines), dtype))
            at += len(slab)

    return activation if activation.dtype in (dtype, IDS) else Activation(dtype, activation.width, slabs)


def _numbers(raw: Array, dtype: torch.dtype, scales: Array | None) -> torch.Tensor:
    """Raw bits [n, width] as the numbers that they stand for. scales: each row's, for int8, which gives float32."""
    if dtype == torch.int8:
        assert scales is not None
        return torch.from_numpy(int8.restored(raw, scales))
    return from_bits(np.ascontiguousarray(raw, dtype=bits_type(dtype)), dtype)


def narrowed(key: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values in another dtype. Raises CaptureError when a finite number becomes infinite. key: the site that the message names."""
    if values.dtype == IDS and dtype != IDS:
        raise CaptureError(f"{key} holds ids, which stay int16.")
    changed = values.to(dtype)
    if torch.promote_types(values.dtype, dtype) == dtype:  # it holds all numbers of the other one
        return changed
    lost = changed.isinf() & values.isfinite()
    if lost.any():
        raise CaptureError(
            f"{key} holds {float(values[lost].abs().max()):.4g}, which {str(dtype).removeprefix('torch.')} cannot hold; "
            "store it as bfloat16 or float32."
        )
    return changed

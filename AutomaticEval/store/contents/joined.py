"""The contents of several files as those of one, which reads them when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from AutomaticEval.errors import CaptureError
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.contents.file_contents import Activation, Contents
from AutomaticEval.store.ragged import Array, Ragged, chained


def joined(files: Sequence[Contents], settings: Mapping[str, Any] | None = None) -> Contents:
    """The samples of all files, one file after the other. They must have the same sites, dtypes and widths; raises CaptureError.

    settings: of the joined file; None takes those of the first one.
    """
    formats = [{key: (each.dtype, each.width) for key, each in file.activations.items()} for file in files]
    if any(each != formats[0] for each in formats):
        raise CaptureError("activations of different sites, dtypes or widths cannot be joined.")
    starts = np.cumsum([0, *(file.n_rows for file in files)])
    segments = [
        file.segments._replace(values=file.segments.values[:] + start)
        for file, start in zip(files, starts, strict=False)
    ]
    return Contents(
        model=files[0].model,
        settings=files[0].settings if settings is None else settings,
        token_ids=chained([file.token_ids for file in files]),
        positions=chained([file.positions for file in files]),
        blocks=_joined_blocks(files),
        segments=Ragged.joined(segments),
        input_ids=Ragged.joined([file.input_ids for file in files]),
        generated_ids=Ragged.joined([file.generated_ids for file in files]),
        strings=lambda: {token: text for file in files for token, text in file.strings().items()},
        columns=_joined_columns(files),
        activations={key: _joined_activation([file.activations[key] for file in files]) for key in formats[0]},
        matrices=files[0].matrices,
    )


def _joined_columns(files: Sequence[Contents]) -> Listed:
    """One sample table. A column that a file does not have is None for its samples."""
    names = dict.fromkeys(name for file in files for name in file.columns.names)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for file in files:
        for name, values in columns.items():
            values += file.columns.whole(name) if name in file.columns.names else [None] * file.n_samples
    return Listed(columns)


def _joined_activation(activations: Sequence[Activation]) -> Activation:
    def slabs() -> Iterator[Array]:
        for activation in activations:
            yield from activation.slabs()

    def scales() -> Iterator[Array]:
        for activation in activations:
            assert activation.scales is not None
            yield from activation.scales()

    first = activations[0]
    return Activation(first.dtype, first.width, slabs, None if first.scales is None else scales)


def _joined_blocks(files: Sequence[Contents]) -> Array | None:
    """Each row's line in the scales of all files, one file's after the other's."""
    if all(file.blocks is None for file in files):
        return None
    blocks, n_lines = [], 0
    for file in files:
        blocks.append(file.blocks[:] + np.int32(n_lines))
        scales = next(each.scales for each in file.activations.values() if each.scales is not None)
        n_lines += sum(map(len, scales()))
    return np.concatenate(blocks)

"""The rows of many sequences, each from one plain forward, kept in a temporary folder, so that one site at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.capture.recompute.plain_forward import plain_forward
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

Array = np.ndarray[Any, Any]


class RowsOnDisk:
    """Gives the rows of a key at one of the positions of each sequence."""

    def __init__(
        self, folder: Path, formats: Mapping[str, tuple[torch.dtype, int]], line: Array, n_places: int
    ) -> None:
        self._folder, self._formats = folder, formats
        self._line, self._n_places = line, n_places  # line: [n_sequences], equal sequences have one

    def read(self, key: str, place: int) -> Tensor:
        """[n_sequences, width], in the model's dtype. place: which of the positions."""
        dtype, width = self._formats[key]
        file = self._folder / _file_name([*self._formats].index(key))
        stored = np.memmap(file, np.uint8, "r").reshape(-1, self._n_places, width * dtype.itemsize)
        return torch.from_numpy(stored[self._line, place]).view(dtype)


@contextmanager
def rows_on_disk(
    loaded: LoadedModel,
    sequences: Callable[[int], Array],
    places: Array,
    keys: Sequence[str],
    advance: Callable[[int], None],
) -> Iterator[RowsOnDisk]:
    """Run a model over many sequences, and keep the rows of some positions until the with ends; the folder is then removed, also after an error.

    sequences: gives the token ids of a number. places: [n_sequences, n_places]: positions in each sequence; nothing after the last of them is fed. Equal sequences are fed once.
    advance: is told of each sequence. Raises as `plain_forward`.
    """
    known: dict[bytes, int] = {}
    line, formats = np.zeros(len(places), dtype=np.int64), dict[str, tuple[torch.dtype, int]]()
    with TemporaryDirectory(prefix="automatic_eval_") as name:
        folder = Path(name)
        with ExitStack() as files:
            opened = [files.enter_context((folder / _file_name(n)).open("wb")) for n in range(len(keys))]
            for number, own in enumerate(places):
                ids = sequences(number)[: int(own.max()) + 1].astype(np.int64)
                digest = blake2b(ids.tobytes() + own.astype(np.int64).tobytes(), digest_size=16).digest()
                if digest not in known:
                    known[digest] = len(known)
                    _write(plain_forward(loaded, ids.tolist(), keys, own.tolist()).rows, keys, opened, formats)
                line[number] = known[digest]
                advance(1)
        yield RowsOnDisk(folder, formats, line, places.shape[1])


def _write(
    rows: Mapping[str, Tensor],
    keys: Sequence[str],
    files: Sequence[BinaryIO],
    formats: dict[str, tuple[torch.dtype, int]],
) -> None:
    """Append the rows [n_places, width] of each key to its file, as raw bytes."""
    for key, file in zip(keys, files, strict=True):
        own = rows[key].contiguous()
        formats[key] = (own.dtype, own.shape[1])
        file.write(own.view(torch.uint8).numpy().tobytes())


def _file_name(number: int) -> str:
    return f"{number}.rows"

"""The folder of a sweep: each layer, scale or place is written when it is done, so a sweep that was cut short goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.errors import StoreError
from AutomaticEval.settings import LATER, SAMPLED
from AutomaticEval.store.disk.array_files import read_arrays, write_arrays
from AutomaticEval.store.disk.json_files import finite, read_json, refuse_others, write_json
from AutomaticEval.store.disk.partial_folders import clear_leftovers

Array = np.ndarray[Any, Any]
ARRAYS = ".safetensors"
"""The ending of parts that are arrays; all others are JSON."""
CHECKSUM = "xxh3_64"
"""The name of the checksum in a layer's file."""
AGAIN = "Delete it, and the same command computes it again."


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep keeps its settings and its parts. The folder is made when it is first used."""

    path: Path

    settings: Mapping[str, Any]
    """What the sweep is of: model, prompts or pairs, and options."""

    def check_settings(self, **more: Any) -> None:
        """Write the settings, or compare them with those of the parts that are there. more: settings that only the sweep knows.

        Raises OtherSettings.
        """
        settings = {**self.settings, **more}
        file = self._settings_file
        parts = [each for kind in (".json", ARRAYS) for each in self.path.glob(f"*{kind}") if each != file]
        if not file.exists() or not parts:  # or left by a sweep that computed nothing
            write_json(file, settings, overwrite=True)
            return
        before = read_json(file)
        if SAMPLED not in before and "weights" in before:  # as the first versions named it
            before[SAMPLED] = before.pop("weights")
            settings = {name: value for name, value in settings.items() if name in before or name in LATER}
        refuse_others(self.path, before, {**dict.fromkeys(before), **settings})

    def layers(self, name: str, numbers: Sequence[int], compute: Callable[[int], Tensor]) -> Tensor:
        """The numbers of some layers, each read from its file, or computed and written: [n_layers, n_places, n_sequences], float64.

        name: of what is computed, for the files. compute: layer -> [n_places, n_sequences], NaN where there is no number.
        Raises StoreError for a damaged file.
        """
        layers: list[Tensor] = []
        for layer in tqdm(numbers, desc=f"Layers ({name})", unit="layer"):
            file = self.path / f"{name}_layer_{layer:03d}.json"
            if not file.exists():
                values = [[each if math.isfinite(each) else None for each in row] for row in compute(layer).tolist()]
                write_json(file, {name: values, CHECKSUM: _checksum(values)})
            layers.append(_read_layer(file, name))
            if layers[-1].shape != layers[0].shape:
                raise _damaged(
                    file, f"it has {list(layers[-1].shape)} numbers, and other layers have {list(layers[0].shape)}"
                )
        return torch.stack(layers)

    @property
    def _settings_file(self) -> Path:
        return self.path / "settings.json"

    def arrays(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
        """Arrays by name, read from their file, or computed and written. Raises StoreError for a damaged file."""
        file = self.path / f"{name}{ARRAYS}"
        if not file.exists():
            computed = dict(compute())
            write_arrays(file, computed)
            return computed
        try:
            return read_arrays(file)
        except StoreError as failure:
            raise StoreError(f"{failure} {AGAIN}") from None

    def arrays_there(self, prefix: str) -> list[Path]:
        """The files of arrays whose names begin like this."""
        return sorted(self.path.glob(f"{prefix}*{ARRAYS}"))

    def remove(self, prefix: str) -> None:
        """Take the settings away and all arrays whose names begin like this, and the folder, when nothing else is in it."""
        for file in (*self.arrays_there(prefix), self._settings_file):
            file.unlink(missing_ok=True)
        clear_leftovers(self.path)
        with suppress(OSError):
            self.path.rmdir()

    def has(self, name: str) -> bool:
        """Whether a part is there."""
        return (self.path / f"{name}.json").exists()

    def part(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """An object, read from its file, or computed and written. compute: gives values of JSON. Raises StoreError for a damaged file."""
        file = self.path / f"{name}.json"
        if not self.has(name):
            computed = finite(compute())
            write_json(file, {"part": computed, CHECKSUM: _checksum(computed)})
        content = read_json(file)
        part = content.get("part")
        if not isinstance(part, dict) or content.get(CHECKSUM) != _checksum(part):
            raise _damaged(file, "it is not what its checksum says")
        return part


def _read_layer(file: Path, name: str) -> Tensor:
    """The numbers of one layer's file: [n_places, n_sequences]. Files of the first versions have no checksum. Raises StoreError."""
    content = read_json(file)
    values = content.get(name)
    if CHECKSUM in content and content[CHECKSUM] != _checksum(values):
        raise _damaged(file, "its numbers are not what its checksum says")
    try:
        rows = [[torch.nan if each is None else each for each in row] for row in values or []]
        table = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError):
        raise _damaged(file, f"it holds no table of numbers named {name!r}") from None
    if table.dim() != 2:
        raise _damaged(file, f"it holds no table of numbers named {name!r}")
    return table


def _checksum(values: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values).encode())


def _damaged(file: Path, why: str) -> StoreError:
    return StoreError(f"{file} is damaged: {why}. {AGAIN}")

"""Direction files: vectors by name with what is known of them, as safetensors; and vectors that other code wrote.

`docs/steering.md` is the contract of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from AutomaticEval.analysis.tensor_file import DIRECTION, PROBE
from AutomaticEval.errors import DamagedFile, StoreError, UnreadableFile
from AutomaticEval.store.disk.json_text import parse_json
from AutomaticEval.store.disk.whole_files import new_file

ALONE = "direction"
"""The name of the tensor of a file with one direction."""


class Stored(NamedTuple):
    """A vector in a file."""

    vector: Tensor
    """[width], of any dtype."""

    about: Mapping[str, Any] | None
    """What the file says of it; None in a file of other code."""


def write_vectors(path: Path, stored: Mapping[str, Stored], *, overwrite: bool) -> None:
    """Write a direction file, whole or not at all. Raises as `TensorFile.prepare`, and StoreError for what JSON cannot hold."""
    DIRECTION.prepare(path, overwrite=overwrite)
    try:
        about = json.dumps({name: each.about for name, each in stored.items()}, allow_nan=False)
    except (TypeError, ValueError) as failure:
        raise StoreError(f"{path}: made_from holds what JSON cannot hold ({failure}).") from None
    metadata = {**DIRECTION.metadata, "directions": about}
    with new_file(path, overwrite=overwrite) as partial:
        save_file({name: each.vector.contiguous() for name, each in stored.items()}, partial, metadata)


def read_vectors(path: Path) -> dict[str, Stored]:
    """The vectors of a file by their names, at least one.

    Raises UnreadableFile for a file that is none, or holds something else than vectors; DamagedFile, NewerFormat.
    """
    if not path.is_file():
        raise UnreadableFile(f"there is no file {path}; a direction is a .safetensors or .npy file.")
    if path.suffix == ".npy":
        return {ALONE: Stored(_of_numpy(path), None)}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
            if metadata.get("format") == PROBE.name:  # which holds vectors, too
                raise UnreadableFile(
                    f"{path} is a probe, and no direction; main.py probe RUN --save_direction FILE writes the direction between its classes."
                )
            _refuse_other_shapes(path, shapes)
            about = _about(path, metadata, shapes)
            return {name: Stored(file.get_tensor(name).reshape(-1), about.get(name)) for name in shapes}
    except SafetensorError as failure:
        raise UnreadableFile(
            f"{path} is no safetensors file ({failure}); a direction is a .safetensors or .npy file."
        ) from None


def _of_numpy(path: Path) -> Tensor:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # which takes no memory for what a header claims
        is_numbers = array.dtype.kind in "fiub"
    except Exception as failure:  # numpy raises many kinds, of its parser and of zip files too
        raise UnreadableFile(f"{path} holds no array of numbers ({failure}).") from None
    if not is_numbers:
        raise UnreadableFile(f"{path} holds {array.dtype}; a direction is a vector of real numbers.")
    vector = torch.from_numpy(np.array(array, np.float32))
    _refuse_other_shapes(path, {path.stem: list(vector.shape)})
    return vector.reshape(-1)


def _refuse_other_shapes(path: Path, shapes: Mapping[str, list[int]]) -> None:
    """Raises UnreadableFile for a file that holds nothing, or tensors that are no vectors. A matrix with one row is a vector."""
    others = [
        f"{name} {shape}" for name, shape in shapes.items() if not shape or set(shape[:-1]) - {1} or shape[-1] < 1
    ]
    if others or not shapes:
        found = f"{', '.join(others[:3])}{' …' if others[3:] else ''}" if others else "nothing"
        raise UnreadableFile(
            f"{path} holds {found}; a direction file holds vectors [width], one or one for each layer."
        )


def _about(path: Path, metadata: Mapping[str, str], shapes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a vector -> what the file says of it; {} for a file of other code."""
    if metadata.get("format") != DIRECTION.name:
        return {}
    DIRECTION.refuse_newer(path, metadata)
    try:
        about = parse_json(metadata["directions"])
        sound = about.keys() == shapes.keys() and all(_is_sound(each) for each in about.values())
    except (KeyError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise DamagedFile(
            f"{path}: its metadata `directions` do not say the site and the layer of each of its vectors."
        )
    return dict(about)


def _is_sound(about: Any) -> bool:
    kinds: dict[str, Any] = {"site": str, "layer": int | None, "made_by": str, "made_from": dict}
    return isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in kinds.items())

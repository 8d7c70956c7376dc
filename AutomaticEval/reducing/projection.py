"""The matrices of a projection: read from a file or taken from Python, one for all sites or one for each.

Knows nothing of models: whether a matrix fits a site is found out where the sites are known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from AutomaticEval.errors import SelectionError
from AutomaticEval.sites import site_of

if TYPE_CHECKING:
    from torch import Tensor

EVERY_SITE = "every_site"
"""The name of a matrix that all sites share."""
_HOW = "give a .npy file with one matrix [width, k], or an .npz or .safetensors file with one for each site (layer_3, layer_3.mlp_out)"


@dataclass(frozen=True)
class Projection:
    """One or more matrices [width, k], by which rows are multiplied."""

    sha256: str
    """A hash of all numbers, shapes and names, by which two projections are told apart."""

    matrices: Mapping[str, Tensor] = field(compare=False, repr=False)
    """Key of a site, or EVERY_SITE -> [width, k], float32, on the CPU."""

    @classmethod
    def of(cls, given: Any) -> Projection:
        """A projection from a file's path, an array or tensor [width, k], or a mapping of a site to one.

        Raises SelectionError for what is no such file or matrix, UnknownSite for a name that is no site.
        """
        if isinstance(given, Projection):
            return given
        where = f"--project {given}" if isinstance(given, str | Path) else "project"
        held = _read(Path(given)) if isinstance(given, str | Path) else given
        named = held if isinstance(held, Mapping) else {EVERY_SITE: held}
        matrices: dict[str, Tensor] = {}
        for name, value in named.items():
            key = name if name == EVERY_SITE else site_of(str(name)).key
            matrices[key] = _matrix(f"{where}: {name}", value)
        if not matrices:
            raise SelectionError(f"{where} holds no matrix; {_HOW}.")
        return cls(_hash(matrices), matrices)

    def matrix(self, key: str, width: int) -> Tensor:
        """The matrix of a site, [width, k]. Raises SelectionError when there is none, or when it is for rows of another width."""
        matrix = self.matrices.get(key, self.matrices.get(EVERY_SITE))
        if matrix is None:
            raise SelectionError(
                f"the projection has no matrix for {key}; it has {', '.join(self.matrices)}. Keep those sites only, or add one for {key}."
            )
        if matrix.shape[0] != width:
            raise SelectionError(
                f"the projection's matrix for {key} is {list(matrix.shape)}; a row of {key} has {width} numbers, so [{width}, k] was expected."
            )
        return matrix


def _read(path: Path) -> Any:
    """What a file holds: an array, or name -> array. Raises SelectionError."""
    import numpy as np

    path = path.expanduser()
    if path.suffix not in (".npy", ".npz", ".safetensors"):
        raise SelectionError(f"--project {path}: its name does not end as that of a file of matrices does; {_HOW}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        held = np.load(path, allow_pickle=False)
        return held if path.suffix == ".npy" else dict(held)
    except Exception as failure:  # the readers raise many kinds; each means that it is not such a file
        raise SelectionError(f"--project {path} cannot be read ({failure}); {_HOW}.") from failure


def _matrix(where: str, value: Any) -> Tensor:
    import torch

    try:
        matrix = torch.as_tensor(value).detach().to("cpu", torch.float32).contiguous()
    except (TypeError, ValueError, RuntimeError) as failure:
        raise SelectionError(f"{where} is no matrix of numbers ({failure}); {_HOW}.") from None
    if matrix.dim() != 2 or not matrix.numel():
        raise SelectionError(f"{where} has the shape {list(matrix.shape)}, expected [width, k]; {_HOW}.")
    if not matrix.isfinite().all():
        raise SelectionError(f"{where} holds numbers that are infinite or NaN, also as float32; every row would, too.")
    return matrix


def _hash(matrices: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(matrices):
        digest.update(f"{name} {list(matrices[name].shape)}\n".encode())
        digest.update(matrices[name].numpy().tobytes())
    return digest.hexdigest()

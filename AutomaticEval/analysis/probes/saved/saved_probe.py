"""`SavedProbe`: a probe that learned from all questions of a run, what it was made of, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from AutomaticEval.analysis.tensor_file import PROBE
from AutomaticEval.errors import DamagedFile, SelectionError
from AutomaticEval.store.disk.json_text import parse_json
from AutomaticEval.store.disk.whole_files import new_file

Array = np.ndarray[Any, Any]
VECTORS = ("weights", "shift", "scale")


@dataclass(frozen=True, eq=False)
class SavedProbe:
    """A logistic probe: the log-odds of the class are ((row - shift) / scale) @ weights + bias.

    >>> saved = load_probe("knows.safetensors")
    >>> saved.probabilities(run.questions().activations(saved.site, saved.position))
    """

    weights: Tensor = field(repr=False)
    shift: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    """[width] each, float32."""

    bias: Tensor = field(repr=False)
    """[1], float32."""

    learned_from: Tensor = field(repr=False)
    """[n], int64: hashes of the words, and of the task and document, of each question that it learned from (`known_again`)."""

    site: str
    """Where its rows are read, such as layer_14."""

    position: str
    target: str
    positive: str
    """The class whose probability it gives."""

    negative: str
    strength: float
    """scikit-learn's C."""

    n_questions: int
    """How many it learned from."""

    model: str
    model_hash: str | None
    """Of every number of the model."""

    chat_template: bool = False
    """Whether the prompts were in the model's chat template."""

    made_from: Mapping[str, Any] = field(default_factory=dict)
    """The run's name, and how it was split. Out of fold, auroc_out_of_fold (with interval_out_of_fold) is the AUROC of the whole procedure, which chooses a place in each fold; auroc_of_place and
    interval_of_place are those of this place alone, which was chosen in chosen_in of n_folds folds."""

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return len(self.weights)

    def log_odds(self, rows: Any) -> Array:
        """[n], float32, for rows [n, width]: a tensor, or an array. Raises SelectionError for rows of another width."""
        table = torch.as_tensor(rows).detach().float().cpu()
        if table.ndim != 2 or table.shape[1] != self.width:
            raise SelectionError(f"the rows are {list(table.shape)}; a probe of {self.site} needs [n, {self.width}].")
        odds: Array = (((table - self.shift) / self.scale) @ self.weights + self.bias).numpy()
        return odds

    def probabilities(self, rows: Any) -> Array:
        """[n], float64: of the class `positive`. Raises as `log_odds`."""
        probabilities: Array = 1 / (1 + np.exp(-np.clip(self.log_odds(rows).astype(np.float64), -500, 500)))
        return probabilities

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a probe file, ending in .safetensors, whole or not at all. Raises PathExists, StoreError."""
        file = Path(path).expanduser()
        PROBE.prepare(file, overwrite=overwrite)
        about = json.dumps({name: getattr(self, name) for name in _ABOUT}, allow_nan=False)
        tensors = {name: getattr(self, name).clone().contiguous() for name in _TENSORS}  # which may share memory
        with new_file(file, overwrite=overwrite) as partial:
            save_file(tensors, partial, {**PROBE.metadata, "probe": about})


_TENSORS = (*VECTORS, "bias", "learned_from")
_ABOUT = tuple(each.name for each in fields(SavedProbe) if each.name not in _TENSORS)


def load_probe(path: str | Path) -> SavedProbe:
    """The probe in a file of `probe --save_probe`, checked.

    Raises UnreadableFile for a file that holds no probe; NewerFormat; DamagedFile for one whose parts do not fit each other.
    """
    file = Path(path).expanduser()
    metadata, tensors = PROBE.read(file)
    try:
        found = SavedProbe(**tensors, **parse_json(metadata["probe"]))
    except (KeyError, TypeError, ValueError):
        raise DamagedFile(f"{file}: its parts are not those of a probe ({', '.join(_TENSORS)}).") from None
    _refuse_unsound(file, found)
    return found


def _refuse_unsound(file: Path, found: SavedProbe) -> None:
    """Raises DamagedFile for vectors of different lengths or types, numbers that are not finite, and a scale that is not above 0."""
    vectors = [getattr(found, name) for name in (*VECTORS, "bias")]
    is_sound = (
        all(each.dtype == torch.float32 and each.ndim == 1 and each.isfinite().all() for each in vectors)
        and len({len(each) for each in vectors[:3]}) == 1
        and len(found.bias) == 1
        and bool((found.scale > 0).all())
        and found.learned_from.dtype == torch.int64
        and all(isinstance(getattr(found, name), str) for name in ("site", "position", "target", "positive", "model"))
    )
    if not is_sound:
        raise DamagedFile(
            f"{file}: weights, shift and scale of a probe are finite, [width] and float32; these are not."
        )

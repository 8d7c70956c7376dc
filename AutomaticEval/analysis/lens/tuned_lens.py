"""`TunedLens`: an affine map for each place, after which the final norm and the unembedding read a row; and its file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from AutomaticEval.analysis.tensor_file import TUNED_LENS
from AutomaticEval.errors import DamagedFile, OtherSettings, SelectionError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.settings import MODEL
from AutomaticEval.store.disk.json_text import parse_json
from AutomaticEval.store.disk.whole_files import new_file


@dataclass(frozen=True, eq=False)
class TunedLens:
    """An affine map for each place: a row x becomes weight @ x + bias, and the final norm and the unembedding read that.

    Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    """Key of a place -> [d_model, d_model], float32, on the CPU. The place that gives the model's own distribution has none: nothing is to be learned there."""

    biases: Mapping[str, Tensor] = field(repr=False)
    """Key of a place -> [d_model]."""

    places: Sequence[str]
    """All places that it may read, also the one without a map."""

    about: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from: model, model_hash, run, numbers of questions, steps, seed, and the held-out divergences. Values are those of JSON."""

    learned: frozenset[str] = field(default_factory=frozenset, repr=False)
    """Digests of the prompts that it learned from, or was chosen on (`prompt_digest`)."""

    def translated(self, key: str, rows: Tensor) -> Tensor:
        """[n, d_model], float32: what the final norm is to read. rows: [n, d_model], of a place."""
        if key not in self.weights:
            return rows
        given = rows.float().cpu()
        return torch.addmm(self.biases[key], given, self.weights[key].T)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the lens as a .safetensors file, whole or not at all. Raises StoreError for another ending, PathExists."""
        with self.saving(path, overwrite=overwrite):
            pass

    @contextmanager
    def saving(self, path: str | Path, *, overwrite: bool = False) -> Iterator[None]:
        """As `save`; the file gets its name when the with ends, and there is none when the with fails."""
        file = Path(path).expanduser()
        TUNED_LENS.prepare(file, overwrite=overwrite)
        tensors = {f"{key}.weight": each.contiguous() for key, each in self.weights.items()}
        tensors |= {f"{key}.bias": each.contiguous() for key, each in self.biases.items()}
        told = {"about": dict(self.about), "places": list(self.places), "learned": sorted(self.learned)}
        metadata = {**TUNED_LENS.metadata, "tuned_lens": json.dumps(told, allow_nan=False)}
        with new_file(file, overwrite=overwrite) as partial:
            save_file(tensors, partial, metadata)
            yield


def load_tuned_lens(path: str | Path) -> TunedLens:
    """The tuned lens in a file. Raises UnreadableFile for a file that is none, DamagedFile, NewerFormat."""
    path = Path(path).expanduser()
    metadata, tensors = TUNED_LENS.read(path)
    weights = {name.removesuffix(".weight"): each for name, each in tensors.items() if name.endswith(".weight")}
    biases = {name.removesuffix(".bias"): each for name, each in tensors.items() if name.endswith(".bias")}
    try:
        told = parse_json(metadata["tuned_lens"])
        lens = TunedLens(
            weights, biases, [str(each) for each in told["places"]], dict(told["about"]), frozenset(told["learned"])
        )
    except (KeyError, ValueError, TypeError):
        raise DamagedFile(f"{path}: its metadata `tuned_lens` does not say what it was made from.") from None
    _refuse_damaged(path, lens)
    return lens


def _refuse_damaged(path: Path, lens: TunedLens) -> None:
    widths = {each.shape for each in lens.weights.values()}
    is_sound = (
        lens.weights.keys() == lens.biases.keys() and lens.weights.keys() <= set(lens.places) and len(widths) <= 1
    )
    for key, weight in lens.weights.items():
        is_sound = is_sound and weight.dim() == 2 and tuple(weight.shape) == 2 * tuple(lens.biases[key].shape)
        is_sound = is_sound and weight.dtype == torch.float32 and bool(weight.isfinite().all())
    if not is_sound:
        raise DamagedFile(f"{path}: its tensors are not one finite square matrix and one vector for each place.")


def tuned_for(given: TunedLens | str | Path | None, places: Sequence[str]) -> TunedLens | None:
    """A tuned lens or that of a file, checked for some places, before a model is loaded. Raises SelectionError for other places; as `load_tuned_lens`."""
    if given is None:
        return None
    lens = given if isinstance(given, TunedLens) else load_tuned_lens(given)
    missing = [key for key in places if key not in lens.places]
    if missing:
        raise SelectionError(
            f"the tuned lens has no map of {', '.join(missing)}; it has {', '.join(lens.places)}. Choose with --sites and --layers."
        )
    return lens


def refuse_other_model(lens: TunedLens, loaded: LoadedModel) -> None:
    """Raises OtherSettings for a tuned lens of another model."""
    then, now = lens.about.get(MODEL), loaded.fingerprint()
    if then != now:
        raise OtherSettings(
            f"the tuned lens was made for {lens.about.get('model')} ({MODEL} {then}), and {loaded.name} has {now}; train one for this model: --train_tuned FILE."
        )


def prompt_digest(text: str) -> str:
    """What tells a prompt from others, 16 hex digits."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

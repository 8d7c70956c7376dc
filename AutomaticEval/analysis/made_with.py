"""`AnalysisSettings`: what every result file says of how it was made. The one place that decides which settings these are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.public_names import public_name
from AutomaticEval.settings import RunSettings


@dataclass(frozen=True)
class TextsRead:
    """Which texts an analysis read."""

    source: str
    """The name of the file or of the profile, never a path; for texts of a profile with the category: "baseline, anger"."""

    n: int
    hash: str
    """The sha256 of the texts in their order."""

    n_truncated: int = 0
    """How many were longer than the model's context and were cut to it."""

    @classmethod
    def of(cls, texts: Sequence[Any], source: str | Path, n_truncated: int = 0) -> TextsRead:
        """texts: strings, or anything that JSON holds, such as token ids and pairs."""
        return cls(public_name(source), len(texts), hash_of(texts), n_truncated)

    @classmethod
    def of_profile(cls, prompts: Mapping[str, Sequence[str]], profile: str) -> dict[str, TextsRead]:
        """Category -> its texts."""
        return {name: cls.of(texts, f"{public_name(profile)}, {name}") for name, texts in prompts.items()}


def hash_of(texts: Iterable[Any]) -> str:
    """The sha256 of texts in their order, each as a line of JSON."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def n_longer(loaded: LoadedModel, texts: Sequence[str]) -> int:
    """How many texts are longer than a model's context."""
    context = loaded.context
    return 0 if context is None else sum(len(loaded.tokenizer(text)["input_ids"]) > context for text in texts)


@dataclass(frozen=True)
class AnalysisSettings:
    """What a result was made with."""

    model: str
    made_with: RunSettings
    """The model's weights (a hash of every number), dtype and attention kernel, and the versions of the libraries."""

    dtype: str
    texts: Mapping[str, TextsRead] = field(default_factory=dict)
    """What the texts were for, such as a category -> which they were."""

    batch_size: int | None = None
    """None where no option sets it."""

    seed: int | None = None
    """The seed of all that was drawn; None where nothing is drawn."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of this analysis, by their names."""

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        texts: Mapping[str, TextsRead],
        *,
        batch_size: int | None = None,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> AnalysisSettings:
        """The settings of an analysis of one model, as it is now."""
        made_with, dtype = loaded.made_with(), str(loaded.model.dtype)
        return cls(loaded.name, made_with, dtype, texts, batch_size, seed, options or {})

    def as_dict(self) -> dict[str, Any]:
        """The settings as result files hold them: those of the model, then the options, then the texts."""
        return {
            "model": self.model,
            **self.made_with.as_dict(),
            "dtype": self.dtype,
            **self.options,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "texts": {name: asdict(each) for name, each in self.texts.items()},
        }

"""A set of texts that goes into one run folder: its name, its texts, and what tells it from other texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from AutomaticEval.capture.texts.sources import Text, as_text
from AutomaticEval.errors import PromptError


@dataclass(frozen=True)
class TextSet:
    """Texts that go into one run folder for each model."""

    name: str
    texts: Any
    """Strings or Texts; iterated once for each model."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the texts are, for the settings, so that a run never goes on with other texts."""
    total: int | None = None
    """How many texts there are, for the progress; None when that is not known."""

    @classmethod
    def of(cls, name: str, texts: Iterable[str | Text], **about: Any) -> TextSet:
        """A set of texts with their number and a hash of them. They are gone through here, and again for each model.

        Raises what as_text raises, before a model is loaded; PromptError for an iterator, which would be used up.
        """
        if iter(texts) is texts:
            raise PromptError(f"the texts of {name} are an iterator, which can be gone through once; give a list.")
        digest, total = xxhash.xxh3_64(), 0
        for text in texts:
            digest.update(json.dumps(as_text(text).text).encode())
            total += 1
        return cls(name, texts, {**about, "texts_xxh3_64": digest.hexdigest()}, total)

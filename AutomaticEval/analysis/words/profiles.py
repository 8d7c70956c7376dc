"""Profiles: labelled prompt sets with their keywords and models, in a TOML file that can be copied and changed."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from AutomaticEval.capture.texts.sources import lines_of
from AutomaticEval.errors import PromptError, SelectionError, did_you_mean

FOLDER = Path(__file__).parent.parent.parent / "profiles"


@dataclass(frozen=True)
class Profile:
    """prompts: category -> its texts. keywords: category -> whole words that tell it. neutral: the category without any."""

    name: str
    prompts: Mapping[str, list[str]]
    keywords: Mapping[str, list[str]]
    neutral: str
    models: tuple[str, ...] = ()

    def category(self, name: str) -> list[str]:
        """Raises SelectionError for a category there is not."""
        if name not in self.prompts:
            raise SelectionError(
                f"the profile {self.name!r} has no category {name!r}.{did_you_mean(name, self.prompts)} It has: "
                f"{', '.join(self.prompts)}."
            )
        return self.prompts[name]


def load_profile(name: str | Path) -> Profile:
    """A profile that comes with the package (baseline, extended), or a TOML file of one's own.

    The file: `prompts` (a JSONL file beside it, of objects with category and text), `neutral`, `models`, and a table `keywords`.
    Raises SelectionError for no such profile, PromptError for what is wrong in it.
    """
    file = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.is_file():
        known = sorted(path.stem for path in FOLDER.glob("*.toml"))
        raise SelectionError(
            f"no profile {str(name)!r}.{did_you_mean(str(name), known)} There are: {', '.join(known)}, or a .toml file of yours."
        )
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        neutral, texts = str(found["neutral"]), file.parent / str(found["prompts"])
        words = _keywords(found.get("keywords", {}), file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise PromptError(f"{file} is not TOML: {broken}") from None
    except KeyError as absent:
        raise PromptError(f"{file} lacks {absent.args[0]!r}; a profile has prompts, neutral and keywords.") from None
    models = found.get("models", [])
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise PromptError(f"{file}: models is no list of names: {models!r}.")
    prompts = _prompts(texts)
    for category in (neutral, *words):
        if category not in prompts:
            raise PromptError(f"{file} names the category {category!r}, of which {texts} has no text.")
    return Profile(file.stem, prompts, words, neutral, tuple(models))


def _keywords(found: object, file: Path) -> dict[str, list[str]]:
    """Category -> its words. Raises PromptError for what is no list of them."""
    if not isinstance(found, dict):
        raise PromptError(f"{file}: keywords is no table of categories; write [keywords].")
    for category, words in found.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise PromptError(f"{file}: the keywords of {category!r} are no list of words: {words!r}.")
    return found


def _prompts(file: Path) -> dict[str, list[str]]:
    if not file.is_file():
        raise PromptError(f"there is no {file}, which the profile names.")
    prompts: dict[str, list[str]] = {}
    for number, line in enumerate(lines_of(file), 1):
        try:
            item = json.loads(line)
            category, text = item["category"], item["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise PromptError(f"{file}, line {number}: not an object with category and text.") from None
        if not isinstance(text, str) or not isinstance(category, str) or not text.strip():
            raise PromptError(f"{file}, line {number}: an empty text, or no text; category and text are texts.")
        prompts.setdefault(category, []).append(text)
    return prompts

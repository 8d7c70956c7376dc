"""Profiles: prompts in categories, with keywords and models, in a TOML file that people can copy and change."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from AutomaticEval.analysis.words.keywords import Words
from AutomaticEval.capture.texts.item_files import objects_with
from AutomaticEval.errors import PromptError, SelectionError, did_you_mean

FOLDER = Path(__file__).parent.parent.parent / "profiles"


@dataclass(frozen=True)
class Profile:
    """Prompts in categories, and the words that tell the categories apart."""

    name: str
    prompts: Mapping[str, list[str]]
    """Category -> its texts."""
    keywords: Mapping[str, Sequence[str]]
    """Category -> whole words that are typical of it."""
    neutral: str
    """The category that the others are compared with. It needs no keywords."""
    models: tuple[str, ...] = ()

    def category(self, name: str) -> list[str]:
        """The texts of a category. Raises SelectionError for a category that the profile does not have."""
        if name not in self.prompts:
            raise SelectionError(
                f"the profile {self.name!r} has no category {name!r}.{did_you_mean(name, self.prompts)} It has: "
                f"{', '.join(self.prompts)}."
            )
        return self.prompts[name]


def load_profile(name: str | Path) -> Profile:
    """A profile that comes with the package (baseline, extended), or one from a TOML file.

    The file holds `prompts` (the name of a file beside it, of objects with category and text: JSONL, CSV, TSV, parquet, …), `neutral`,
    `models`, and a table `keywords`. Raises SelectionError for a profile that does not exist, PromptError for a mistake in the file, which it names.
    """
    file = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.is_file():
        known = sorted(path.stem for path in FOLDER.glob("*.toml"))
        raise SelectionError(
            f"no profile {str(name)!r}.{did_you_mean(str(name), known)} There are: {', '.join(known)}, or a .toml file of yours."
        )
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        neutral, texts = str(table["neutral"]), file.parent / str(table["prompts"])
        words = _keywords(table.get("keywords", {}), file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise PromptError(f"{file} is not TOML: {broken}") from None
    except KeyError as absent:
        raise PromptError(f"{file} lacks {absent.args[0]!r}; a profile has prompts, neutral and keywords.") from None
    models = table.get("models", [])
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise PromptError(f"{file}: models is no list of names: {models!r}.")
    prompts = _prompts(texts)
    for category in (neutral, *words):
        if category not in prompts:
            raise PromptError(f"{file} names the category {category!r}, of which {texts} has no text.")
    return Profile(file.stem, prompts, words, neutral, tuple(models))


def _keywords(table: object, file: Path) -> dict[str, list[str]]:
    """Category -> its words. Raises PromptError for a category whose words are no list of words."""
    if not isinstance(table, dict):
        raise PromptError(f"{file}: keywords is no table of categories; write [keywords].")
    for category, words in table.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise PromptError(f"{file}: the keywords of {category!r} are no list of words: {words!r}.")
        try:
            Words(words)
        except PromptError as never_found:
            raise PromptError(f"{file}, category {category!r}: {never_found}") from None
    return table


def _prompts(file: Path) -> dict[str, list[str]]:
    """Category -> its texts, from a file of objects. Raises PromptError, with the line."""
    if not file.is_file():
        raise PromptError(f"there is no {file}, which the profile names.")
    prompts: dict[str, list[str]] = {}
    for place, (category, text) in objects_with(("category", "text"), file):
        if not isinstance(text, str) or not isinstance(category, str) or not text.strip():
            raise PromptError(f"{place}: an empty text, or no text; category and text are texts.")
        prompts.setdefault(category, []).append(text)
    return prompts

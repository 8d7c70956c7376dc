"""Texts from a file: JSON or JSONL, each item a text or an object with one in a field of a known name."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from AutomaticEval.errors import PromptError

T = TypeVar("T")
FIELDS = ("input", "text", "question")
"""Where an object's text is: the first of these that it has."""


def read_texts(path: str | Path) -> list[str]:
    """Raises PromptError, with the line, for what is no text or an empty one, and for a file without texts."""
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"no file {path}; give a JSON or JSONL file of texts.")
    texts = [_text_of(item, f"{path}, {place}") for place, item in _items(path)]
    if not texts:
        raise PromptError(f"{path} holds no texts.")
    return texts


def drawn(texts: list[T], n: int | None, seed: int) -> list[T]:
    """n of the texts at random, in their order; all when there are no more, or n is None."""
    if n is not None and n < 1:
        raise PromptError(f"{n} texts were asked for; at least 1 is needed.")
    if n is None or n >= len(texts):
        return texts
    return [texts[index] for index in sorted(random.Random(seed).sample(range(len(texts)), n))]


def lines_of(path: Path) -> list[str]:
    """A file's lines, divided by newlines alone: JSON strings may hold the other characters that end a line.

    Raises PromptError for what is not UTF-8.
    """
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as broken:
        raise PromptError(f"{path} is not UTF-8: byte {broken.start}.") from None
    return whole.removesuffix("\n").split("\n") if whole else []


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """(its place, item) of a JSON list, or of a file with an item a line."""
    lines = lines_of(path)
    whole = "\n".join(lines)
    if whole.lstrip().startswith("["):
        yield from ((f"item {number}", item) for number, item in enumerate(_parsed(whole, path, 1), 1))
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as broken:
        raise PromptError(f"{path}, line {line + broken.lineno - 1}: not JSON ({broken.msg}).") from None


def _text_of(item: Any, place: str) -> str:
    if isinstance(item, dict):
        name = next((field for field in FIELDS if field in item), None)
        if name is None:
            raise PromptError(f"{place}: none of the fields {', '.join(FIELDS)}; found {', '.join(item) or 'none'}.")
        item, place = item[name], f"{place}, field {name!r}"
    if not isinstance(item, str) or not item.strip():
        raise PromptError(
            f"{place}: {'an empty text' if isinstance(item, str) else type(item).__name__ + ', not a text'}."
        )
    return item

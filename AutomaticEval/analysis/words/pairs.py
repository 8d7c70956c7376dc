"""Pairs of a clean and a corrupted prompt, and the two tokens whose logits tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from AutomaticEval.analysis.words.targets import one_token
from AutomaticEval.capture.texts.item_files import objects_with
from AutomaticEval.errors import PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted prompt, and a word that follows each."""

    clean: str
    corrupted: str
    answer: str
    """What follows the clean prompt: one token."""
    wrong: str
    """What follows the corrupted prompt: one token."""


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from a file of objects with clean, corrupted, answer and wrong: JSONL, CSV, TSV, parquet, …

    Raises PromptError for a file that holds no pairs, and for a line that is none; it names the line.
    """
    path = Path(path)
    pairs = []
    for place, texts in objects_with(("clean", "corrupted", "answer", "wrong"), path):
        if not all(isinstance(text, str) and text for text in texts):
            raise PromptError(f"{place}: clean, corrupted, answer and wrong are texts, none of them empty.")
        pairs.append(Pair(*texts))
    if not pairs:
        raise PromptError(f"{path} holds no pairs.")
    return pairs


def told_apart(loaded: LoadedModel, pair: Pair) -> tuple[int, int]:
    """The token ids of answer and wrong. Raises PromptError when either is several tokens, or both are the same one."""
    answer, wrong = (one_token(loaded.tokenizer, text) for text in (pair.answer, pair.wrong))
    if answer == wrong:
        raise PromptError(f"{pair.answer!r} and {pair.wrong!r} are the same token.")
    return answer, wrong

"""Text metrics of an answer's wording: how long it is, and how much it repeats itself. A word is a stretch of letters, digits and _."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import nan

from AutomaticEval.analysis.words.metrics import TextMetric

PHRASE = 3
"""The words of a phrase."""


def wording() -> list[TextMetric]:
    """The number of words, the share of different words, and the share of repeated phrases. NaN where a text is too short for a share."""
    return [
        TextMetric("words", "words an answer", lambda texts: [float(len(_words(text))) for text in texts]),
        TextMetric(
            "different words", "share of an answer's words", lambda texts: [_different(_words(text)) for text in texts]
        ),
        TextMetric(
            "repetition",
            f"share of phrases of {PHRASE} words",
            lambda texts: [_repeated(_words(text)) for text in texts],
        ),
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _different(words: Sequence[str]) -> float:
    return len(set(words)) / len(words) if words else nan


def _repeated(words: Sequence[str]) -> float:
    """The share of phrases that stand earlier in the text, too."""
    phrases = [tuple(words[start : start + PHRASE]) for start in range(len(words) - PHRASE + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else nan

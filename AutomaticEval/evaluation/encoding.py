"""Texts encoded many at a time, shortly before lm-eval asks for them one by one: tokenizers work on all cores then.

lm-eval encodes each request as a whole, and its context once for each of its choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

MANY = 512


class EncodedAhead:
    """texts: in about the order in which they will be asked for."""

    def __init__(self, texts: Iterable[str], encode: Callable[[Sequence[str]], Sequence[list[int]]]) -> None:
        self._coming, self._encode = iter(texts), encode
        self._ready: dict[str, list[int]] = {}

    def get(self, text: str) -> list[int] | None:
        """The tokens of a text, or None when it is not among the next."""
        if text not in self._ready:
            coming = list(dict.fromkeys(islice(self._coming, MANY)))
            if coming:
                self._ready = dict(zip(coming, self._encode(coming), strict=True))
        return self._ready.get(text)


def texts_of(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What lm-eval encodes of (context, continuation): both as one text, and the context without spaces at its end."""
    for context, continuation in pairs:
        if context:
            yield context + continuation
            yield context.rstrip()

"""Texts as lm-eval feeds them: encoded many at a time, shortly before it asks for them one by one; cut into windows.

Tokenizers work on all cores when they are given many. lm-eval encodes each request as a whole, and its context once for each of
its choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from os.path import commonprefix

from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

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


def rolling_windows(lm: HFLM, text: str) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each window in which lm-eval scores a whole text.

    The context is one token, at first the prefix token; the last window is filled up with as much context as fits.
    """
    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text), prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
    )
    return [(list(context), list(continuation)) for context, continuation in map(make_disjoint_window, windows)]


def shared_beginnings(texts: Sequence[str]) -> tuple[list[float], list[int]]:
    """(the part of each text that another one begins with, too, and groups of those that share at least half).

    Group 0 has those that share less.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    shares, groups, group = [0.0] * len(texts), [0] * len(texts), 1
    for before, index in pairwise(order):
        n_alike = len(commonprefix([texts[before], texts[index]]))  # noqa: RUF071 - texts, not paths
        for each in (before, index):
            shares[each] = max(shares[each], n_alike / max(1, len(texts[each])))
        if 2 * n_alike < min(len(texts[before]), len(texts[index])):
            group += 1
            continue
        groups[before] = groups[index] = group
    return shares, groups


def texts_of(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What lm-eval encodes of (context, continuation): both as one text, and the context without spaces at its end."""
    for context, continuation in pairs:
        if context:
            yield context + continuation
            yield context.rstrip()

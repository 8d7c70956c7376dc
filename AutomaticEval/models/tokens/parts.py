"""`PartEncoder`: encodes many texts that begin alike, what they share once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.tokens.cuts import Around, around, last_cut

FEWEST = 32
"""The fewest characters that are worth sharing."""


class PartEncoder:
    """Encodes lists of texts. Texts that follow each other, also from list to list, share what they begin with.

    Where it is not proven that a text may be cut, whole texts are encoded. One text of each list is encoded whole all the same, and compared.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._around: Around | None = around(tokenizer)
        self._known: dict[str, list[int]] = {}
        """The parts of the last list, and their tokens."""
        self._last = ""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with the special tokens that the tokenizer adds. Raises CaptureError when the comparison fails."""
        if self._around is None or not texts:
            return self._encoded(texts, add_special_tokens=True)
        before, after = self._around
        parts = [
            [text[start:stop] for start, stop in pairwise(bounds)]
            for text, bounds in zip(texts, self._bounds(texts), strict=True)
        ]
        new = [part for part in dict.fromkeys(chain.from_iterable(parts)) if part not in self._known]
        known = self._known | dict(zip(new, self._encoded(new, add_special_tokens=False), strict=True))
        self._known = {part: known[part] for own in parts for part in own}
        self._last = texts[-1]
        found = [[*before, *chain.from_iterable(known[part] for part in own), *after] for own in parts]
        most_cut = max(range(len(texts)), key=lambda number: len(parts[number]))
        if self._encoded([texts[most_cut]], add_special_tokens=True) != [found[most_cut]]:
            raise CaptureError(
                f"{type(self._tokenizer).__name__} gives a text other tokens in {len(parts[most_cut])} parts than whole, which was held to be "
                f"impossible for it ({texts[most_cut][:60]!r}…). Nothing was asked. Please report the tokenizer."
            )
        return found

    def _encoded(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), return_attention_mask=False, add_special_tokens=add_special_tokens)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _bounds(self, texts: Sequence[str]) -> list[list[int]]:
        """Where each text begins, is cut and ends: where it parts from its neighbours, and where these are cut before that."""
        cuts = [_shared_cut(*pair) for pair in pairwise([self._last, *texts])]
        bounds = []
        own: list[int] = []
        for text, cut, next_cut in zip(texts, cuts, [*cuts[1:], 0], strict=True):
            own = sorted({*(each for each in own if each <= cut), cut, next_cut} - {0, len(text)})
            bounds.append([0, *own, len(text)])
        return bounds


def _shared_cut(first: str, second: str) -> int:
    """The last place at which both texts may be cut, and before which they are the same; 0 for one that is not worth it."""
    n_alike = n_chars_alike(first, second)
    ends_one = n_alike == min(len(first), len(second))
    cut = last_cut(max(first, second, key=len), n_alike if ends_one else n_alike - 1)
    return cut if cut >= FEWEST else 0


def n_chars_alike(first: str, second: str) -> int:
    """The number of characters with which both texts begin."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # the first `low` characters are alike; beyond `high` none is known to be
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

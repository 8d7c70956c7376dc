"""`Words`: finds keywords in texts, however a text writes them: composed or not, with curly apostrophes, over a line break, in Chinese."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from AutomaticEval.errors import PromptError

APOSTROPHES = dict.fromkeys("‘’‛ʼ`´′＇", "'")
"""Characters that people type for an apostrophe."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""
LETTER = rf"[^\W{UNSPACED}]"
"""A letter, digit or underscore of a script that separates words."""
JOINING = re.compile("[\u1160-\u11ff\uff9e\uff9f]")
"""Characters, besides combining marks, that NFKC may join with the one before."""


class Words:
    """Finds any of some words in a text, whole and in upper or lower case.

    Words and texts are compared in Unicode's form NFKC, with one apostrophe, and with one space for any white space. A word is whole when no
    letter stands before its first letter, and none after its last. Letters of scripts without spaces between words (Chinese, Japanese, Thai)
    do not count in this: such a word is found anywhere. Nor does an end that is no letter: `c++` and `:)` are found before and after anything.
    Raises PromptError for a word that could never be found.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [plain(word).strip() for word in words]
        for word, written in zip(self.words, words, strict=True):
            if not any(unicodedata.category(character)[0] in "LNPS" for character in word):
                raise PromptError(
                    f"the keyword {written!r} has no letter, digit, punctuation mark or symbol, so that no text holds it; leave it out."
                )
        longest_first = sorted(self.words, key=len, reverse=True)  # "thank you" before "thank"
        self._pattern = re.compile("|".join(map(_whole, longest_first)) or "(?!)", re.IGNORECASE)

    def found(self, text: str) -> list[tuple[int, int]]:
        """The first character and the end of each word in a text, as it is written."""
        pieces = list(_pieces(text))
        places = [(start, end) for start, end, written in pieces for _ in written]
        matches = self._pattern.finditer("".join(written for _, _, written in pieces))
        return [(places[match.start()][0], places[match.end() - 1][1]) for match in matches]


def plain(text: str) -> str:
    """A text in NFKC, with one apostrophe, and with one space for any white space."""
    return "".join(written for _, _, written in _pieces(text))


def _pieces(text: str) -> Iterator[tuple[int, int, str]]:
    """The text in pieces that can be written in NFKC one by one: first character, end, and the piece in NFKC."""
    start = 0
    while start < len(text):
        end = start + 1
        is_space = text[start].isspace()
        while end < len(text) and (text[end].isspace() if is_space else _joins(text[end])):
            end += 1
        written = unicodedata.normalize("NFKC", text[start:end].translate(_APOSTROPHES))
        yield start, end, " " if is_space else written
        start = end


def _joins(character: str) -> bool:
    return unicodedata.combining(character) > 0 or JOINING.match(character) is not None


def _whole(word: str) -> str:
    """A pattern for a word, whole."""
    before = f"(?<!{LETTER})" if re.match(LETTER, word[0]) else ""
    after = f"(?!{LETTER})" if re.match(LETTER, word[-1]) else ""
    return before + re.escape(word) + after


_APOSTROPHES = str.maketrans(APOSTROPHES)

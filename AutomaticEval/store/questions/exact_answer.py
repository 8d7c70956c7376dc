"""Where the exact answer stands in what a model said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from AutomaticEval.thinking.where import Span

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"[-+]?\$?[\d,]*\.?\d+")
_NOT_WITHIN = r"(?<![A-Za-z\d.,])(?<!^[-−])(?<![^\w)\]}%][-−])"
"""Before a number: no letter or digit, and no minus that is its sign, as that of a difference (10-7) is not."""


def exact_answer(response: str, said: Span | None, prediction: Any, choices: Sequence[str] = ()) -> Span | None:
    """The last place in the answer where the prediction stands, as a whole word or number; None where it does not stand there.

    said: where the answer is in the response, without its thinking. prediction: the text of the run. A capital letter is looked for where it stands as
    one (`B.`, `(B)`, or at a line's end), then the text of that choice, where there are choices, then the letter as a word, and last a small letter that
    stands as one. A number is none within another (-5, H2O), and a full stop or comma at the prediction's end is no part of it.
    """
    if said is None or not isinstance(prediction, str) or not prediction.strip():
        return None
    for pattern in _patterns(prediction.strip(), choices):
        found = list(pattern.finditer(response, *said))
        if found:
            return found[-1].span()
    return None


def _patterns(text: str, choices: Sequence[str]) -> Iterator[re.Pattern[str]]:
    """What is looked for, the surest first."""
    number = _LETTERS.find(text.upper()) if len(text) == 1 else -1
    if number >= 0:
        alone = rf"(?<!\w){text}(?=[).:,\]}}*_]|\s*[-–—]\s|\s*$)"
        yield re.compile(alone, re.MULTILINE)
        if number < len(choices) and choices[number].strip():
            yield _as_word(choices[number].strip(), re.IGNORECASE)
        yield _as_word(text)
        yield re.compile(alone, re.MULTILINE | re.IGNORECASE)  # as any word, "a" would be an article
        return
    bare = text.rstrip(".,")
    if _NUMBER.fullmatch(bare):
        digits = ",?".join(map(re.escape, bare.replace(",", "")))  # 1000 may stand there as 1,000
        yield re.compile(rf"{_NOT_WITHIN}{digits}(?![.,]?\d)")
        return
    yield _as_word(text)
    yield _as_word(text, re.IGNORECASE)


def _as_word(text: str, flags: int = 0) -> re.Pattern[str]:
    before, after = (r"(?<!\w)" * text[0].isalnum(), r"(?!\w)" * text[-1].isalnum())
    return re.compile(before + re.escape(text) + after, flags)

"""What a model thought, and what it answered: a response taken apart at `</think>`."""

from __future__ import annotations

import re
from typing import NamedTuple

_OPENS, _CLOSES = re.compile(r"<think(?:ing)?>"), re.compile(r"</think(?:ing)?>")
_ENDS_OPEN = re.compile(r"<think(?:ing)?>\s*$")


class Said(NamedTuple):
    """A response in its two parts."""

    thinking: str | None
    """None for a response without thinking."""

    answer: str | None
    """What follows the thinking. None when the thinking was not finished."""


def split_thinking(response: str, prompt: str = "") -> Said:
    """The two parts of a response. prompt: if it ends with `<think>`, as some chat templates do, the response begins with thinking."""
    closes = list(_CLOSES.finditer(response))
    answer = response[closes[-1].end() :] if closes else response
    if _OPENS.search(answer) or (not closes and _ENDS_OPEN.search(prompt)):
        return Said(_OPENS.sub("", response, count=1), None)
    if not closes:
        return Said(None, response)
    return Said(_OPENS.sub("", response[: closes[-1].start()], count=1), answer)


Span = tuple[int, int]
"""Half-open, in characters."""


def spans(response: str, prompt: str = "") -> tuple[Span | None, Span | None]:
    """Where the two parts of `split_thinking` are in a response, without tags and the blanks around them. None for a part that is not there, or is blank."""
    said, opened = split_thinking(response, prompt), _OPENS.search(response)
    closes = list(_CLOSES.finditer(response))
    begins = opened.end() if opened and not response[: opened.start()].strip() else 0
    if said.answer is None:
        return _stripped(response, begins, len(response)), None
    ends = closes[-1].end() if closes else 0
    thought = None if said.thinking is None else _stripped(response, begins, closes[-1].start())
    return thought, _stripped(response, ends, len(response))


def _stripped(text: str, start: int, stop: int) -> Span | None:
    part = text[start:stop]
    start, n = start + len(part) - len(part.lstrip()), len(part.strip())
    return (start, start + n) if n else None

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

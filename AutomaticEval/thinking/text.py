"""What a response thinks, and what it answers, as texts: as its sample says, or taken apart at `</think>` in the files that do not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from AutomaticEval.thinking.where import Span, Thinking

_OPENS, _CLOSES = re.compile(r"<think(?:ing)?>"), re.compile(r"</think(?:ing)?>")
_ENDS_OPEN = re.compile(r"<think(?:ing)?>\s*$")


class Said(NamedTuple):
    """The texts of a response in its two parts."""

    thinking: str | None
    """None for a response without thinking."""

    answer: str | None
    """What follows the thinking. None when the thinking was not finished."""


def columns_of(thinking: Thinking, said: Said) -> dict[str, Any]:
    """The columns of a sample that say where its response thinks and answers; with thinking also the texts of both."""
    return {**thinking.columns(), **({} if thinking.span is None else said._asdict())}


def said_of_record(record: Mapping[str, Any], response: str, prompt: str) -> Said:
    """The two parts of a sample's response: from its columns, or by its text in a file that does not have them."""
    known = Thinking.of_record(record)
    if known is None:
        return split_thinking(response, prompt)
    if known.span is None:
        return Said(None, response)
    thinking, answer = (each if isinstance(each, str) else None for each in map(record.get, ("thinking", "answer")))
    return Said(thinking or "", answer)


def split_thinking(response: str, prompt: str = "") -> Said:
    """The two parts of a response. prompt: if it ends with `<think>`, as some chat templates do, the response begins with thinking."""
    closes = list(_CLOSES.finditer(response))
    answer = response[closes[-1].end() :] if closes else response
    if _OPENS.search(answer) or (not closes and _ENDS_OPEN.search(prompt)):
        return Said(_OPENS.sub("", response, count=1), None)
    if not closes:
        return Said(None, response)
    return Said(_OPENS.sub("", response[: closes[-1].start()], count=1), answer)


def bounds(response: str, prompt: str = "") -> tuple[Span | None, int | None]:
    """Where the two parts of `split_thinking` are in a response: the thinking without its tags, and where the answer begins."""
    said, opened = split_thinking(response, prompt), _OPENS.search(response)
    closes = list(_CLOSES.finditer(response))
    begins = opened.end() if opened and not response[: opened.start()].strip() else 0
    if said.answer is None:
        return (begins, len(response)), None
    if said.thinking is None:
        return None, 0
    return (begins, closes[-1].start()), closes[-1].end()


def spans(response: str, prompt: str = "") -> tuple[Span | None, Span | None]:
    """`bounds` without the blanks around the two parts. None for a part that is not there, or is blank."""
    thinking, answer = bounds(response, prompt)
    return (
        None if thinking is None else stripped(response, *thinking),
        None if answer is None else stripped(response, answer, len(response)),
    )


def stripped(text: str, start: int, stop: int) -> Span | None:
    """A part of a text without the blanks around it; None when nothing is left."""
    part = text[start:stop]
    start, n = start + len(part) - len(part.lstrip()), len(part.strip())
    return (start, start + n) if n else None

"""The tokens of a response by what they say: `thinking[-1]`, `answer[0]`, `exact_answer[-1]`; and whether a position is in the prompt.

Where a part begins and ends is told by the sample table; in older files, which do not say it, by the text of the response.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.selection import OF_THINKING, Positions
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.thinking_in import ThinkingIn
from AutomaticEval.store.questions.exact_answer import exact_answer
from AutomaticEval.store.questions.spelling import in_bytes, spelled
from AutomaticEval.store.ragged import Array
from AutomaticEval.thinking.text import spans, stripped
from AutomaticEval.thinking.where import Span

OF_RESPONSE = ("response", "prediction", "choices", "logprobs")
"""The columns of questions that tell which tokens these are."""
NONE = -1
"""In the place of a token's position: there is no such token."""
_GRAMMAR = re.compile(r"(thinking|answer|exact_answer)\[(-?\d+)\]")


class ResponseToken(NamedTuple):
    """A token of a part of a response, by its number in that part."""

    part: str
    number: int

    @classmethod
    def parse(cls, position: str | int) -> ResponseToken | None:
        """None for a position that is spelled in another way."""
        match = _GRAMMAR.fullmatch(position.replace(" ", "")) if isinstance(position, str) else None
        return match and cls(match[1], int(match[2]))


def is_in_prompt(position: str | int) -> bool:
    """Whether the position is one of the prompt, for every question. Raises UnknownPositions."""
    if isinstance(position, int) or position == "first" or ResponseToken.parse(position) is not None:
        return False
    return Positions.parse(position).part == "prompt"


def is_in_response(position: str | int) -> bool:
    """Whether only a response has the position. Raises UnknownPositions."""
    if isinstance(position, int) or position in ("first", "last"):
        return False
    return ResponseToken.parse(position) is not None or Positions.parse(position).part in ("response", *OF_THINKING)


def positions_in_response(
    contents: Contents, samples: Array, columns: Sequence[Sequence[Any]], wanted: ResponseToken
) -> Array:
    """[n_questions]: the position of the token in its sequence; NONE where the response has no such token, and for questions with choices.

    samples: [n_questions]: their numbers in contents. columns: those of OF_RESPONSE. The very last token was never fed, and counts as none.
    """
    strings, parts = contents.strings(), _Parts(contents)
    found = np.full(len(samples), NONE, dtype=np.int64)
    rows = zip(samples.tolist(), *columns, strict=True)
    for number, (sample, response, prediction, choices, logprobs) in enumerate(rows):
        if response is None or logprobs:
            continue
        ids, n_prompt = contents.generated_ids.item(sample).tolist(), len(contents.input_ids.item(sample))
        within = parts.of(wanted.part, sample, response, n_prompt, len(ids))
        if within is None:
            continue
        (text, span), (first, stop) = within
        if wanted.part == "exact_answer":
            span = exact_answer(text, span, prediction, choices)
        token = None if span is None else _token(text, span, ids[first:stop], strings, wanted.number)
        if token is not None and first + token < len(ids) - 1:
            found[number] = n_prompt + first + token
    return found


class _Within(NamedTuple):
    """A part of a response: where it is in a text, and the tokens that spell that text."""

    place: tuple[str, Span | None]
    """The text, and the part in it without the blanks around it; None for a part that is not there."""

    tokens: Span
    """Counted from the beginning of the response."""


class _Parts:
    """The parts of the responses of a file: from the sample table, or by their text in a file that does not have them."""

    def __init__(self, contents: Contents) -> None:
        self._prompts, self._thinking = contents.columns.whole("prompt"), ThinkingIn(contents)
        there = [name for name in ("thinking", "answer") if name in contents.columns.names]
        self._texts = {name: contents.columns.whole(name) for name in there}

    def of(self, name: str, sample: int, response: str, n_prompt: int, n_response: int) -> _Within | None:
        """None for a part that is not there. name: of an exact answer, its answer."""
        known, is_thinking = self._thinking.known(sample), name == "thinking"
        if known is None:
            span = spans(response, self._prompts[sample])[0 if is_thinking else 1]
            return _Within((response, span), (0, n_response))
        if known.span is None:
            return None if is_thinking else _whole(response, (0, n_response))
        if is_thinking:
            tokens = (known.span[0] - n_prompt, known.span[1] - n_prompt)
            return _whole(self._text("thinking", sample), tokens)
        if known.answer_start is None:
            return None
        return _whole(self._text("answer", sample), (known.answer_start - n_prompt, n_response))

    def _text(self, name: str, sample: int) -> str:
        """That of a part; "" in a file that another program wrote without it."""
        text = self._texts[name][sample] if name in self._texts else None
        return text if isinstance(text, str) else ""


def _whole(text: str, tokens: Span) -> _Within:
    """A text that is the part."""
    return _Within((text, stripped(text, 0, len(text))), tokens)


def _token(response: str, part: Span, ids: list[int], strings: Mapping[int, str], index: int) -> int | None:
    """The number of a token of a part among the tokens of the response; None where it has no such token, or its tokens do not spell it."""
    own = spelled(response, [strings.get(each) for each in ids])
    if own is None:
        return None
    start, stop = in_bytes(response, part)
    tokens = list(_within(own, start, stop))
    is_whole = bool(own) and own[-1][1] >= stop  # else its last tokens are unknown: one that was not fed has no string
    if not -len(tokens) <= index < len(tokens) or (index < 0 and not is_whole):
        return None
    return tokens[index]


def _within(own: list[Span], start: int, stop: int) -> Iterator[int]:
    """The tokens that spell something of a part."""
    return (number for number, (first, last) in enumerate(own) if max(first, start) < min(last, stop))

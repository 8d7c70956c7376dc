"""Where a response thinks, and where it answers: the one rule, once the marks around its thinking are known.

Positions are those of tokens in the sample's own sequence. Marks such as `<think>` and `</think>` belong neither to the thinking nor to the answer.
Which tokens are marks is told by `capture/answers/think_marks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Span = tuple[int, int]
"""Half-open, in tokens or in characters."""


class Thinking(NamedTuple):
    """Where one response thinks and answers, as positions in its sequence."""

    span: Span | None
    """Of the tokens of the thinking. None for a response without thinking."""

    answer_start: int | None
    """The position of the answer's first token, or that after the last token when nothing follows the thinking. None when the thinking was not finished."""

    @classmethod
    def without(cls, n_prompt: int) -> Thinking:
        """Of a response without thinking, or of a continuation that was scored: it answers from its first token on."""
        return cls(None, n_prompt)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Thinking | None:
        """That of a sample's columns; None for a sample of an older file, and for one that was not generated."""
        start, stop, answer = (record.get(name) for name in COLUMNS)
        if start is None and answer is None:
            return None
        return cls(None if start is None or stop is None else (start, stop), answer)

    def columns(self) -> dict[str, int]:
        """The columns of a sample; those that it does not have are left out."""
        start, stop = self.span or (None, None)
        values = dict(zip(COLUMNS, (start, stop, self.answer_start), strict=True))
        return {name: value for name, value in values.items() if value is not None}

    def wrong(self, n_prompt: int, n_response: int) -> str | None:
        """What is wrong with these positions for a sequence of so many tokens; None when nothing is."""
        named = [*(self.span or ()), *([] if self.answer_start is None else [self.answer_start])]
        if named != sorted(named) or any(not n_prompt <= each <= n_prompt + n_response for each in named):
            return f"its thinking at {self.span} and its answer from {self.answer_start} do not lie in its response, which is at {n_prompt} to {n_prompt + n_response}"
        return None


COLUMNS = ("thinking_start", "thinking_stop", "answer_start")
"""The columns that say where a response thinks and answers."""


def between_marks(
    opens: Sequence[Span], closes: Sequence[Span], n: int, *, is_open: bool
) -> tuple[Span | None, int | None]:
    """(thinking, answer start) of a response of n tokens, counted from its beginning.

    opens, closes: the marks in it, ascending. is_open: the prompt ends with a mark that opens.
    The answer follows the last mark that closes. A mark that opens after it begins thinking that was not finished. The thinking begins after the first mark
    when that one opens, and otherwise with the response: a template that is not in the prompt opened it.
    """
    after = closes[-1][1] if closes else 0
    is_unfinished = (is_open and not closes) or any(start >= after for start, _ in opens)
    if not closes and not is_unfinished:
        return None, 0
    is_first = bool(opens) and (not closes or opens[0][0] < closes[0][0])
    begin = opens[0][1] if is_first and not (is_open and opens[0][0] > 0) else 0
    stop = n if is_unfinished else closes[-1][0]
    return (begin, max(begin, stop)), None if is_unfinished else after

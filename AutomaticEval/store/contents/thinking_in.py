"""Where the responses of a file think and answer: from the sample table, or by the text of the responses of an older file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from AutomaticEval.errors import StoreError
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.questions.spelling import in_bytes, spelled
from AutomaticEval.thinking.text import bounds
from AutomaticEval.thinking.where import COLUMNS, Thinking

TEXTS = ("prompt", "response", "logprob")
"""The columns by which the text of a response is looked at."""


class ThinkingIn:
    """Gives the `Thinking` of a sample by its number. Columns are read once, when the first is asked for."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    @cached_property
    def _places(self) -> dict[str, list[Any]]:
        return self._whole(COLUMNS)

    @cached_property
    def _texts(self) -> dict[str, list[Any]]:
        return self._whole(TEXTS)

    def _whole(self, wanted: Sequence[str]) -> dict[str, list[Any]]:
        names = self._contents.columns.names
        return {name: self._contents.columns.whole(name) for name in wanted if name in names}

    def known(self, number: int) -> Thinking | None:
        """What the sample table says; None for a sample of an older file, and for one that was not generated.

        Raises StoreError for places that are not in the response.
        """
        wrong = self.problem(number)
        if wrong is not None:
            raise StoreError(f"{wrong}; another program wrote it so, or it is damaged.")
        return self._told(number)

    def problem(self, number: int) -> str | None:
        """What is wrong with the places that the sample table says; None when nothing is."""
        told = self._told(number)
        if told is None:
            return None
        lists = (self._contents.input_ids, self._contents.generated_ids)
        n_prompt, n_response = (int(each.offset[number + 1] - each.offset[number]) for each in lists)
        wrong = told.wrong(n_prompt, n_response)
        return None if wrong is None else f"sample {number}: {wrong}"

    def _told(self, number: int) -> Thinking | None:
        return Thinking.of_record({name: values[number] for name, values in self._places.items()})

    def of(self, number: int) -> Thinking:
        """Raises StoreError for a response of an older file whose tokens do not spell its text."""
        known = self.known(number)
        if known is not None:
            return known
        record = {name: values[number] for name, values in self._texts.items()}
        n_prompt, ids = len(self._contents.input_ids.item(number)), self._contents.generated_ids.item(number).tolist()
        if record.get("logprob") is not None or not ids:  # scored, or a text
            return Thinking.without(n_prompt)
        response = record.get("response") or ""
        span, answer = bounds(response, record.get("prompt") or "")
        if span is None:
            return Thinking.without(n_prompt)
        strings = self._contents.strings()
        parts = spelled(response, [strings.get(each) for each in ids])
        if parts is None:
            raise StoreError(
                f"sample {number} does not say where its thinking ends, as files do since version 1.6, and its tokens do not spell its response."
            )
        thinking = _tokens(response, span, parts, len(ids))
        after = None if answer is None else _tokens(response, (answer, len(response)), parts, len(ids))[0]
        return Thinking((n_prompt + thinking[0], n_prompt + thinking[1]), None if after is None else n_prompt + after)


def _tokens(text: str, span: tuple[int, int], parts: list[tuple[int, int]], n: int) -> tuple[int, int]:
    """The tokens that lie wholly in a part of a text. parts: what each spells, in bytes; of the n tokens the last may be unknown, and count as within."""
    first, last = in_bytes(text, span)
    start = next((number for number, (begin, _) in enumerate(parts) if begin >= first), len(parts))
    stop = n if span[1] == len(text) else sum(end <= last for _, end in parts)
    return start, max(start, stop)

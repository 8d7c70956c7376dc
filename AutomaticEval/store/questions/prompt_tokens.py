"""`PromptTokens`: the tokens of a question's prompt that have rows, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from AutomaticEval.store.questions.source import Source


class PromptTokens(Mapping[int, str]):
    """Position in the prompt -> the token's string, for each position that has a row. A copy of it is a plain dict."""

    def __init__(self, source: Source, sample: int) -> None:
        self.source, self.sample = source, sample
        """The run, and the number of the sample whose prompt it is."""

    @cached_property
    def _tokens(self) -> dict[int, str]:
        contents = self.source.contents
        if contents.is_by_sample:
            return {}
        strings, n_prompt = contents.strings(), len(contents.input_ids.item(self.sample))
        rows = zip(*contents.fed(self.sample), strict=True)
        return {position: strings[token] for token, position in rows if position < n_prompt}

    def __getitem__(self, position: int) -> str:
        return self._tokens[position]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return repr(self._tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles do not hold the run."""
        return dict, (self._tokens,)

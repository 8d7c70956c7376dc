"""Which of a generated row's tokens are its answer. A row that has stopped generates on until its whole batch has stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

from AutomaticEval.capture.generation import until_end


@dataclass(frozen=True)
class AnswerReader:
    """Reads the answers of one batch as lm-eval reads them."""

    decode: Callable[[list[int]], str]
    stop: Sequence[str]
    """The strings that end an answer."""

    end_token_id: Any
    """One token id, several, or None, as in a generation config."""

    think_end_token: str | int | None = None
    """What the thinking ends with, which lm-eval cuts off before it looks for stop strings: a text, or the id of a token."""

    def text(self, generated: list[int]) -> str:
        """The text of the answer, as lm-eval scores it: without the thinking that it cuts off, the stop string and what follows it."""
        end = self.think_end_token
        if isinstance(end, int):
            return self._cut(self.decode(generated[self._n_thought(generated) :]).lstrip())
        return str(postprocess_generated_text(self.decode(generated), list(self.stop), end))

    def whole(self, generated: list[int]) -> str:
        """The text of the whole response, of which the end is cut as that of the answer."""
        if self.think_end_token is None:
            return self.text(generated)
        text, rest = self.decode(generated), self._uncut(generated)
        return text[: len(text) - (len(rest) - len(self._cut(rest)))]

    def own(self, generated: list[int]) -> list[int]:
        """A row's tokens up to its own end: its end token, or the token that completes its first stop string."""
        ended = until_end(generated, self.end_token_id)
        if not self._has_stop(ended):
            return ended
        low, high = self._n_thought(ended), len(ended)  # there is a stop string in ended[:high], none in ended[:low]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has_stop(ended[:middle]) else (middle, high)
        answer = self.text(ended)
        if self.text(ended[:high]) == answer:
            return ended[:high]
        # A later token can change the text of an earlier one (byte fallback), and a stop string can vanish again.
        first = 1 + self._n_thought(ended)
        return next((ended[:n] for n in range(first, len(ended)) if self.text(ended[:n]) == answer), ended)

    def _n_thought(self, generated: list[int]) -> int:
        """How many tokens there are up to the last one that ends the thinking; 0 when none does."""
        end = self.think_end_token
        if end is None:
            return 0
        if isinstance(end, int):
            return len(generated) - generated[::-1].index(end) if end in generated else 0
        n_marks = self.decode(generated).count(end)
        low, high = 0, len(generated)  # all marks are in generated[:high], and not in generated[:low]
        while n_marks and high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.decode(generated[:middle]).count(end) >= n_marks else (middle, high)
        return high if n_marks else 0

    def _has_stop(self, generated: list[int]) -> bool:
        text = self._uncut(generated)
        return any(each in text for each in self.stop if each)

    def _uncut(self, generated: list[int]) -> str:
        """The text of the answer with all that follows it."""
        if self.think_end_token is None:
            return self.decode(generated)
        return self._without_stops.text(generated)

    @cached_property
    def _without_stops(self) -> AnswerReader:
        return AnswerReader(self.decode, (), self.end_token_id, self.think_end_token)

    def _cut(self, text: str) -> str:
        return str(postprocess_generated_text(text, list(self.stop), None))

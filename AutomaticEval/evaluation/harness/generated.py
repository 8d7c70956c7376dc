"""Which of a generated row's tokens are its answer. A row that has stopped generates on until its whole batch has stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    def text(self, generated: list[int]) -> str:
        """The text of the answer, without the stop string and what follows it."""
        return str(postprocess_generated_text(self.decode(generated), list(self.stop), None))

    def own(self, generated: list[int]) -> list[int]:
        """A row's tokens up to its own end: its end token, or the token that completes its first stop string."""
        ended = until_end(generated, self.end_token_id)
        if not self._has_stop(ended):
            return ended
        low, high = 0, len(ended)  # there is a stop string in ended[:high], none in ended[:low]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has_stop(ended[:middle]) else (middle, high)
        answer = self.text(ended)
        if self.text(ended[:high]) == answer:
            return ended[:high]
        # A later token can change the text of an earlier one (byte fallback), and a stop string can vanish again.
        return next((ended[:n] for n in range(1, len(ended)) if self.text(ended[:n]) == answer), ended)

    def _has_stop(self, generated: list[int]) -> bool:
        text = self.decode(generated)
        return any(each in text for each in self.stop if each)

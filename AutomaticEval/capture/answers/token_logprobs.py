"""The log-probability of each token of a generated answer, from the very logits that it was chosen from.

It is the model's own: the log-softmax, in float32, of the logits as the model gave them, before temperature, top-p, penalties and every
other logits processor. Nothing waits for the device while the model generates.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.capture.answers.processors import processing


class TokenLogprobs:
    """A logits processor that stands before all others and changes nothing. It looks up each token once it is chosen."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        """[batch, columns]: prompts and answers, as they were before the last step."""
        self._likely: Tensor | None = None
        """[batch, d_vocab]: the log-probabilities of the last step, until its token is known."""
        self._found: list[Tensor] = []
        """[batch, 1] for each token before the last step, on the device."""
        self._is_token_by_token = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [batch, columns]. scores: the logits of the next token [batch, d_vocab], which are given back as they are."""
        if self._ids is not None and self._likely is not None:
            if input_ids.shape != (len(self._ids), self._ids.shape[1] + 1):
                self._is_token_by_token = False
                return scores
            self._found.append(self._likely.gather(1, input_ids[:, -1:]))
        self._ids, self._likely = input_ids, torch.log_softmax(scores, -1, dtype=torch.float32)
        return scores

    def of(self, sequences: Tensor, n_prompt: int) -> Tensor | None:
        """The log-probability of each generated token, [batch, n_new], float32, on the CPU.

        sequences: what `generate` gave, [batch, n_prompt + n_new]. None when it did not choose one token after another for each row, as in
        beam search and assisted decoding.
        """
        if self._ids is None or self._likely is None or not self._is_token_by_token:
            return None
        found, n_new = self._found, sequences.shape[1] - n_prompt
        if len(found) == n_new - 1 and len(sequences) == len(self._likely):
            found = [*found, self._likely.gather(1, sequences[:, -1:])]
        n_shared = min(sequences.shape[1], self._ids.shape[1])  # on a GPU, transformers takes back steps after the end
        if len(found) < n_new or not torch.equal(sequences[:, :n_shared], self._ids[:, :n_shared]):
            return None
        return torch.cat(found, 1)[:, :n_new].cpu()


@contextmanager
def token_logprobs(model: Any, *, is_wanted: bool = True) -> Iterator[TokenLogprobs]:
    """Inside, the log-probabilities of the tokens that the model's `generate` chooses are kept, when they are wanted."""
    found = TokenLogprobs()
    with processing(model, first=found if is_wanted else None):
        yield found


def answer_column(found: Tensor | None, row: int, n_tokens: int) -> dict[str, Any]:
    """The column `token_logprobs` of one answer. found: those of its batch, [batch, n_new]; None gives no column. n_tokens: of the answer."""
    if found is None:
        return {}
    return {"token_logprobs": array("f", found[row, :n_tokens].tolist())}

"""One call of lm-eval with a list of requests: which batches are computed here, and what was answered.

A batch that was answered before (a run that is resumed), or is another process's (one that is shared), is not computed; order
and shape of the batches stay lm-eval's own. Knows nothing of activations.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from AutomaticEval.errors import CaptureError
from AutomaticEval.evaluation.harness.batches import Batch
from AutomaticEval.evaluation.results.requests import Answered, RequestKey, set_random_state
from AutomaticEval.processes import Ranks

UNKNOWN = "this version of lm-eval is not known (0.4.13 is)"


class Request(NamedTuple):
    """What is asked of the model: a continuation to score after a prompt, or (response None) one to generate."""

    key: RequestKey
    prompt: str
    response: str | None


class Call:
    """Follows lm-eval through one call of `loglikelihood`, `loglikelihood_rolling` or `generate_until`.

    ready: told when every request of a batch that was computed here is answered.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        answered: Mapping[RequestKey, Answered],
        ranks: Ranks,
        ready: Callable[[], None],
    ) -> None:
        self.requests = requests
        self.tokens: dict[int, tuple[list[int], list[int]]] = {}
        """Index -> (context, continuation): of rolling windows beforehand, of others once lm-eval has encoded them."""
        self.answers: dict[int, Any] = {}
        self.computed: set[int] = set()
        self._answered, self._ranks, self._ready = answered, ranks, ready
        asked = 0
        for request in requests if ranks.n_ranks > 1 else ():
            asked = zlib.crc32(repr(request).encode(errors="replace"), asked)
        if len(set(ranks.gathered(asked))) > 1:
            raise CaptureError(
                "the processes of the run ask different questions: a task draws at random where no seed reaches."
            )
        self._list_start = self._n_listed = 0  # lm-eval scores rolling windows in several lists
        self._n_batches = 0
        self._announced: Batch | None = None
        self._waiting: deque[int] = deque()

    def listed(self, requests: Sequence[Any]) -> list[Any]:
        """A list of requests that is about to be scored, each with its index in the place of its text.

        lm-eval hands that on and never looks at it.
        """
        self._list_start = self._n_listed
        tagged = [(self._list_start + number, *tokens) for number, (_, *tokens) in enumerate(requests)]
        for index, *tokens in tagged:
            if self.tokens.setdefault(index, tuple(tokens)) != tuple(tokens):
                raise CaptureError(f"{self.requests[index].key}: lm-eval's window is not ours; {UNKNOWN}.")
        self._n_listed += len(tagged)
        return tagged

    def take_answered(self) -> set[int]:
        """Take the answers that are there from before. Returns which requests they answer."""
        for index, request in enumerate(self.requests):
            before = self._answered.get(request.key)
            if before is not None:
                self._take(index, before)
        return set(self.answers)

    def answer(self, index: int, answer: Any) -> None:
        """A request is answered without lm-eval."""
        self.answers[index] = answer
        self.computed.add(index)

    def begins(self, batch: Batch) -> bool:
        """Whether a batch that lm-eval is about to make is to be computed here."""
        if self._announced is not None or self._waiting:
            raise CaptureError(f"lm-eval made a batch that no forward served; {UNKNOWN}.")
        batch = [[self._list_start + index for index in row] for row in batch]
        is_mine = self._n_batches % self._ranks.n_ranks == self._ranks.rank
        self._n_batches += 1
        if self._was_answered([index for row in batch for index in row], is_mine=is_mine):
            return False
        self._announced = batch if is_mine else None
        return is_mine

    def _was_answered(self, indices: Sequence[int], *, is_mine: bool) -> bool:
        """Take the answers of a batch from before, if all are there."""
        before = [self._answered.get(self.requests[index].key) for index in indices]
        if not all(before):
            return False
        for index, each in zip(indices, before, strict=True):
            assert each is not None
            self._take(index, each)
            if each.random_state is not None and is_mine:
                set_random_state(each.random_state)
        return True

    def _take(self, index: int, before: Answered) -> None:
        before.check(self.requests[index].prompt, self.requests[index].response)
        self.answers[index] = before.answer

    def fed(self, n_rows: int) -> Batch:
        """The batch that a forward of so many rows serves."""
        batch, self._announced = self._announced, None
        if batch is None or len(batch) != n_rows:
            found = "none" if batch is None else len(batch)
            raise CaptureError(f"a forward of {n_rows} rows, but {found} were announced; {UNKNOWN}.")
        self._waiting.extend(index for row in batch for index in row)
        return batch

    def hear(self, kind: str, request: Any, answer: Any) -> None:
        """Takes an answer, at the moment when lm-eval would write it into its cache."""
        if kind == "loglikelihood_rolling":  # the sum over windows, each of which was heard
            return
        index = self._waiting.popleft()
        if kind == "loglikelihood" and request != index:
            raise CaptureError(f"{self.requests[index].key}: answers come in another order; {UNKNOWN}.")
        before = self._answered.get(self.requests[index].key)
        if before is None:
            self.answers[index] = answer
            self.computed.add(index)
        else:  # of a batch that was cut elsewhere than it was: what is on the disk stands
            self._take(index, before)
        if not self._waiting:
            self._ready()

    def complete(self, own: Sequence[Any]) -> list[Any]:
        """The answers to all requests: from before, computed here, and computed by other processes.

        own: what lm-eval gives back, with placeholders for what was not computed here.
        """
        for index in self.computed:
            if repr(own[index]) != repr(self.answers[index]):  # repr: nan is nan
                raise CaptureError(f"{self.requests[index].key}: {own[index]!r} is not its answer; {UNKNOWN}.")
        answers = {index: answer for each in self._ranks.gathered(self.answers) for index, answer in each.items()}
        if len(answers) != len(self.requests):
            raise CaptureError(f"{len(self.requests) - len(answers)} requests were not answered; {UNKNOWN}.")
        return [answers[index] for index in range(len(answers))]

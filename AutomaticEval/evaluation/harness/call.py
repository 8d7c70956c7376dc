"""`Call`: one call of lm-eval with a list of requests, which of its batches are computed here, and the answers.

A batch is not computed here when an earlier process of the run answered it (a resumed run), or when another process computes it (a
shared run). The order and the shape of batches stay lm-eval's own. This module knows nothing of activations.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from AutomaticEval.errors import CaptureError
from AutomaticEval.evaluation.harness.batches import Batch
from AutomaticEval.evaluation.results.earlier_answers import EarlierAnswer, set_random_state
from AutomaticEval.evaluation.results.request_key import RequestKey
from AutomaticEval.processes import Ranks

UNKNOWN = "this version of lm-eval is not known (0.4.13 is)"


class Request(NamedTuple):
    """One request of lm-eval: a continuation to score after a prompt, or (response None) one to generate."""

    key: RequestKey
    prompt: str
    response: str | None


@dataclass(frozen=True)
class Workload:
    """Which documents an evaluation asks, and which of its requests are computed in this process."""

    doc_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Task -> the documents' own indices, for tasks of which only some documents are asked."""

    answered: Mapping[RequestKey, EarlierAnswer] = field(default_factory=dict)
    """The requests that are not computed again."""

    ranks: Ranks = field(default_factory=Ranks)
    """The processes that share the requests. Each is given all requests, and gets all answers."""


class Call:
    """Follows lm-eval through one call of `loglikelihood`, `loglikelihood_rolling` or `generate_until`.

    on_ready: called when every request of a batch that was computed here is answered.
    """

    def __init__(self, requests: Sequence[Request], workload: Workload, on_ready: Callable[[], None]) -> None:
        self.requests = requests
        self.tokens: dict[int, tuple[list[int], list[int]]] = {}
        """Index -> (context, continuation): of rolling windows beforehand, of others once lm-eval has encoded them."""
        self.answers: dict[int, Any] = {}
        self.computed: set[int] = set()
        """The indices of the requests that were computed here."""
        self._earlier, self._ranks, self._is_ready = workload.answered, workload.ranks, on_ready
        self._check_equal_in_all_processes()
        self._list_start = self._n_listed = 0  # lm-eval scores rolling windows in several lists
        self._n_batches = 0
        self._announced: Batch | None = None
        """The batch that lm-eval has made, and not fed yet."""
        self._waiting: deque[int] = deque()
        """The requests that were fed, and not answered yet, in the order of their answers."""

    def _check_equal_in_all_processes(self) -> None:
        checksum = 0
        for request in self.requests if self._ranks.n_ranks > 1 else ():
            checksum = zlib.crc32(repr(request).encode(errors="replace"), checksum)
        if len(set(self._ranks.gathered(checksum))) > 1:
            raise CaptureError(
                "the processes of the run ask different questions: a task draws at random where no seed reaches."
            )

    def listed(self, requests: Sequence[Any]) -> list[Any]:
        """A list of requests that is about to be scored, each with its index in the place of its text.

        lm-eval hands the text on and never looks at it.
        """
        self._list_start = self._n_listed
        tagged = [(self._list_start + number, *tokens) for number, (_, *tokens) in enumerate(requests)]
        for index, *tokens in tagged:
            if self.tokens.setdefault(index, tuple(tokens)) != tuple(tokens):
                raise CaptureError(f"{self.requests[index].key}: lm-eval's window is not ours; {UNKNOWN}.")
        self._n_listed += len(tagged)
        return tagged

    def take_earlier(self) -> set[int]:
        """Take every answer that is on the disk already. Returns the indices of the requests that have one."""
        for index, request in enumerate(self.requests):
            earlier = self._earlier.get(request.key)
            if earlier is not None:
                self._take(index, earlier)
        return set(self.answers)

    @property
    def earlier_tokens(self) -> int | None:
        """The tokens of a forward over the prefix tree in the run that is resumed; None without answers from such a forward."""
        return next((each.tokens for each in self._earlier.values() if each.tokens is not None), None)

    def answer(self, index: int, answer: Any) -> None:
        """Set the answer to a request that was computed here, without lm-eval's batches."""
        self.answers[index] = answer
        self.computed.add(index)

    def begins(self, batch: Batch) -> bool:
        """Whether a batch that lm-eval is about to make is to be computed here."""
        if self._announced is not None or self._waiting:
            raise CaptureError(f"lm-eval made a batch that no forward served; {UNKNOWN}.")
        batch = [[self._list_start + index for index in row] for row in batch]
        is_mine = self._n_batches % self._ranks.n_ranks == self._ranks.rank
        self._n_batches += 1
        if self._take_batch([index for row in batch for index in row], is_mine=is_mine):
            return False
        self._announced = batch if is_mine else None
        return is_mine

    def _take_batch(self, indices: Sequence[int], *, is_mine: bool) -> bool:
        """Take the answers to a batch from the disk. Returns whether all are there; otherwise none is taken."""
        batch = [self._earlier.get(self.requests[index].key) for index in indices]
        if not all(batch):
            return False
        for index, earlier in zip(indices, batch, strict=True):
            assert earlier is not None
            self._take(index, earlier)
            if earlier.random_state is not None and is_mine:
                set_random_state(earlier.random_state)
        return True

    def _take(self, index: int, earlier: EarlierAnswer) -> None:
        earlier.check(self.requests[index].prompt, self.requests[index].response)
        self.answers[index] = earlier.answer

    def fed(self, n_rows: int) -> Batch:
        """The batch that a forward of so many rows serves."""
        batch, self._announced = self._announced, None
        if batch is None or len(batch) != n_rows:
            n_announced = "none" if batch is None else len(batch)
            raise CaptureError(f"a forward of {n_rows} rows, but {n_announced} were announced; {UNKNOWN}.")
        self._waiting.extend(index for row in batch for index in row)
        return batch

    def hear(self, kind: str, request: Any, answer: Any) -> None:
        """Take an answer, at the moment when lm-eval would write it into its cache."""
        if kind == "loglikelihood_rolling":  # the sum over windows, each of which was heard
            return
        index = self._waiting.popleft()
        if kind == "loglikelihood" and request != index:
            raise CaptureError(f"{self.requests[index].key}: answers come in another order; {UNKNOWN}.")
        earlier = self._earlier.get(self.requests[index].key)
        if earlier is None:
            self.answer(index, answer)
        else:  # the batches were cut elsewhere when the run began: what is on the disk stands
            self._take(index, earlier)
        if not self._waiting:
            self._is_ready()

    def complete(self, own: Sequence[Any]) -> list[Any]:
        """The answers to all requests: those from the disk, those computed here, and those of other processes.

        own: what lm-eval gives back, with placeholders for what was not computed here.
        """
        for index in self.computed:
            if repr(own[index]) != repr(self.answers[index]):  # repr: nan is nan
                raise CaptureError(f"{self.requests[index].key}: {own[index]!r} is not its answer; {UNKNOWN}.")
        answers = {index: answer for each in self._ranks.gathered(self.answers) for index, answer in each.items()}
        if len(answers) != len(self.requests):
            raise CaptureError(f"{len(self.requests) - len(answers)} requests were not answered; {UNKNOWN}.")
        return [answers[index] for index in range(len(answers))]

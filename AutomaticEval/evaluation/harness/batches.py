"""Between lm-eval's batches and our requests: which requests each batch row serves, and what was answered.

lm-eval forgets which request a row serves. Its Collator alone knows order and grouping, so the Collator is asked. Answers come back
through the hook by which lm-eval would cache them. No scoring code is copied.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm_eval.models import huggingface
from lm_eval.models.utils import Collator

Batch = list[list[int]]
"""For each row of a batch: the indices of the requests that it answers."""


@dataclass(frozen=True)
class Follower:
    """What a `RecordingCollator` is to do for one call of lm-eval."""

    is_wanted: Callable[[Batch], bool]
    """Asked of each batch: whether it is to be computed here."""

    placeholder: Any
    """What takes the place of an answer that is not computed here."""

    groups: Sequence[int] = ()
    """The group of each request. Requests of one group are batched one after the other. Empty: lm-eval's own order."""


class RecordingCollator(Collator):  # type: ignore[misc]
    """lm-eval's Collator, which asks of each batch whether it is to be computed here."""

    def __init__(self, follower: Follower, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follower = follower
        self._order: deque[int] = deque()
        self._members: dict[int, list[int]] | None = None
        if self._group_by == "contexts":  # now: get_cache takes groups out as it goes
            groups = self._arr_with_indices.values()
            self._members = {index: [other for other, _ in group] for group in groups for index, _ in group}
        self._computed: list[int] = []

    def _reorder(self, arr: Any) -> Iterator[Any]:
        arr = list(arr)
        waiting: dict[int, deque[int]] = defaultdict(deque)  # tuples pass by identity; equal ones keep their order
        for index, request in arr:
            waiting[id(request)].append(index)
        ordered = [(waiting[id(request)].popleft(), request) for request in super()._reorder(arr)]
        groups = self._follower.groups
        if groups:
            ordered.sort(key=lambda each: groups[each[0]])
        for index, request in ordered:
            self._order.append(index)
            yield request

    def get_batched(self, n: int = 1, batch_fn: Any = None) -> Iterator[Any]:
        for chunk in super().get_batched(n=n, batch_fn=batch_fn):
            served = [self._order.popleft() for _ in chunk]
            batch = [[index] if self._members is None else self._members[index] for index in served]
            if self._follower.is_wanted(batch):
                self._computed += [index for row in batch for index in row]
                yield chunk

    def get_original(self, newarr: list[Any]) -> list[Any]:
        """The answers computed here in the order of the requests, and placeholders."""
        answers = [self._follower.placeholder] * self._size
        for index, answer in zip(self._computed, newarr, strict=True):
            answers[index] = answer
        return answers


class AnswerHook:
    """Takes the place of lm-eval's cache hook. It is told of every answer, in the order in which they are computed."""

    def __init__(self, hear: Callable[[str, Any, Any], None]) -> None:
        self.add_partial = hear


@contextmanager
def recording(is_wanted: Callable[[Batch], bool], placeholder: Any, groups: Sequence[int] = ()) -> Iterator[None]:
    """Have lm-eval's hf model use a RecordingCollator."""
    stock = huggingface.Collator
    huggingface.Collator = partial(RecordingCollator, Follower(is_wanted, placeholder, groups))
    try:
        yield
    finally:
        huggingface.Collator = stock

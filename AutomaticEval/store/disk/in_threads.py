"""Does pieces of work that read or write files in several threads, which wait for the disk and copy beside one another.

Knows nothing of what the work is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 4
"""Linux lets one thread at a time copy into a file; more threads than these would wait for one another."""


def n_threads_for(n_bytes: int, least_bytes: int) -> int:
    """How many threads are worth their start for so many bytes: one for each least_bytes, and no more than there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores, n_bytes // least_bytes))


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], n_threads: int) -> list[Result]:
    """work for every item, in the order of the items. n_threads: this thread, and n_threads - 1 others.

    The first failure is raised when all threads have ended what they were at; what was not begun is not done. When the system gives no
    more threads, those that there are do the work.
    """
    if n_threads == 1:
        return [work(item) for item in items]
    crew = _Crew(work, items)
    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(n_threads, len(items)) - 1):
            helper = threading.Thread(target=crew.run, name="store")
            helper.start()
            helpers.append(helper)
    except RuntimeError:
        pass
    crew.run()
    for helper in helpers:
        helper.join()
    if crew.failures:
        raise crew.failures[0]
    return [crew.results[number] for number in range(len(items))]


class _Crew(Generic[Item, Result]):
    """Threads that take items one after the other."""

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self._work, self._waiting, self._mutex = work, iter(enumerate(items)), threading.Lock()
        self.results: dict[int, Result] = {}
        self.failures: list[BaseException] = []

    def run(self) -> None:
        while not self.failures:
            with self._mutex:
                taken = next(self._waiting, None)
            if taken is None:
                return
            try:
                self.results[taken[0]] = self._work(taken[1])
            except BaseException as failure:  # raised by `in_threads`
                self.failures.append(failure)

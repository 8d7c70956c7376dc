"""Shards that are being written while the samples of the next are gathered.

A shard is first filled, which needs its rows, and then settled: the disk has to have all of it before it gets its name. While the disk
settles a shard, whose rows are not in memory any more, the next one is filled. Shards get their names in the order in which they were started.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

from AutomaticEval.store.hdf5.writing.activations import Source

Write = Callable[[], AbstractContextManager[Source]]
"""Fills a shard's file when the with begins, and settles and names it when the with ends."""

MOST = 2
"""Shards in flight: one is filled while one settles."""


class SealedShard(NamedTuple):
    """A shard that is on the disk."""

    source: Source
    n_samples: int


class ShardInFlight:
    """A shard that a thread of its own writes. It lets go of the shard's rows as soon as they are in the file."""

    def __init__(self, write: Write, n_samples: int, before: threading.Event | None) -> None:
        self._write: Write | None = write
        self._n_samples, self._before = n_samples, before
        self._sealed: SealedShard | None = None
        self._failure: BaseException | None = None
        self.filled, self.ended = threading.Event(), threading.Event()
        """ended: whether the shard is on the disk, or has failed."""

        self._thread = threading.Thread(target=self._run, name="sealing")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._fill_and_settle()
        except BaseException as failure:  # raised by `wait`
            self._failure = failure
        finally:
            self._write = None
            self.filled.set()
            self.ended.set()

    def _fill_and_settle(self) -> None:
        assert self._write is not None
        with ExitStack() as file:
            source = file.enter_context(self._write())
            self._write = None
            self.filled.set()
            if self._before is not None:
                self._before.wait()
        self._sealed = SealedShard(source, self._n_samples)

    def wait(self) -> SealedShard:
        """The shard, once it is on the disk. Raises what stopped the writing."""
        self.ended.wait()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._sealed is not None
        return self._sealed


class ShardsInFlight:
    """Shards that were started, and not taken yet. It keeps nothing of its writer, so that a writer that is dropped frees its lock at once."""

    def __init__(self) -> None:
        self._shards: deque[ShardInFlight] = deque()

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def first_has_ended(self) -> bool:
        """Whether the shard that was started first is written, or has failed."""
        return bool(self._shards) and self._shards[0].ended.is_set()

    def wait_until_filled(self) -> None:
        """Return when no shard that was started needs its rows."""
        for shard in self._shards:
            shard.filled.wait()

    def wait_until_ended(self) -> None:
        """Return when no thread writes any more."""
        for shard in self._shards:
            shard.ended.wait()

    def start(self, write: Write, n_samples: int) -> None:
        """Begin with a shard, which has n_samples. Raises RuntimeError, and has begun nothing, when the system gives no thread."""
        before = self._shards[-1].ended if self._shards else None
        self._shards.append(ShardInFlight(write, n_samples, before))

    def take(self) -> SealedShard:
        """The shard that was started first, once it is on the disk. Raises what stopped the writing; the shard is then taken, too."""
        first = self._shards[0]
        first.ended.wait()  # Ctrl-C meanwhile must not forget the shard
        self._shards.popleft()
        return first.wait()

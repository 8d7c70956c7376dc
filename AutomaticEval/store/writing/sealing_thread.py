"""A thread that writes one shard while the samples of the next are gathered."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from AutomaticEval.store.hdf5.writing.activations import Source


class SealedShard(NamedTuple):
    """A shard that is on the disk."""

    source: Source
    n_samples: int


class SealingThread:
    """Writes shards one at a time. It keeps nothing of its writer, so that a writer that is dropped frees its lock at once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sealing")
        self.sealing: Future[SealedShard] | None = None
        """The shard that was started and not waited for yet."""

    def start(self, write: Callable[[], Source], n_samples: int) -> None:
        """Begin with a shard. The one before must have been waited for. write: writes the shard, which has n_samples."""
        assert self.sealing is None
        self.sealing = self._thread.submit(lambda: SealedShard(write(), n_samples))

    @property
    def has_ended(self) -> bool:
        """Whether the shard that was started is written, or has failed."""
        return self.sealing is not None and self.sealing.done()

    def wait(self) -> SealedShard | None:
        """The shard that was started, once it is written; None when there is none. Raises what stopped the writing, once."""
        if self.sealing is None:
            return None
        failure = self.sealing.exception()  # waits; Ctrl-C meanwhile must not forget the shard
        ended, self.sealing = self.sealing, None
        if failure is not None:
            raise failure
        return ended.result()

    def close(self) -> None:
        self._thread.shutdown()

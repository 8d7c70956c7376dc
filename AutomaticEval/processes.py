"""The processes that one run is shared by, as `torchrun` or `accelerate launch` started them.

Only Python objects are exchanged, over gloo on the CPU, so that it works the same with and without GPUs.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long a process waits for the slowest; the launcher ends all when one fails."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    n_ranks: int = 1
    _group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process draws up the run folder, joins and prints."""
        return self.rank == 0

    def gathered(self, mine: T) -> list[T]:
        """What each process gives, in the order of the ranks. All must call it; it waits for the slowest."""
        if self.n_ranks == 1:
            return [mine]
        found: list[Any] = [None] * self.n_ranks
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def from_first(self, mine: T | None) -> T:
        """What the first process gives; the others wait for it."""
        first = self.gathered(mine if self.is_first else None)[0]
        assert first is not None
        return first


def join_ranks() -> Ranks:
    """The processes that a launcher started together with this one; alone without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return Ranks()
    if not dist.is_initialized():
        import torch.distributed.nn  # noqa: F401  imported later, its defaults would hold the group for ever

        dist.init_process_group("gloo", timeout=PATIENCE)
        atexit.register(_leave)
    group = None if dist.get_backend() == "gloo" else _gloo_group()
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


def _leave() -> None:
    """Before the interpreter goes: gloo's threads, which give Python's tensors back, must not outlive it, or the process ends in SIGABRT."""
    if dist.is_initialized():
        dist.destroy_process_group()


_group_of_all: Any = None


def _gloo_group() -> Any:
    """A group beside that of the caller, made once."""
    global _group_of_all
    _group_of_all = _group_of_all or dist.new_group(backend="gloo", timeout=PATIENCE)
    return _group_of_all


def own_device(device: str = "auto") -> str:
    """The device asked for; of auto, the GPU of this process where a launcher gave each its own."""
    local = os.environ.get("LOCAL_RANK")
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"

"""The processes that share one run, as `torchrun` or `accelerate launch` started them.

They exchange Python objects only, over gloo on the CPU, which works the same with and without GPUs.
"""

from __future__ import annotations

import atexit
import os
import shlex
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long a process waits for the slowest one. When a process fails, the launcher ends all of them."""


def command_line(*arguments: str) -> str:
    """The command that runs the program of this process with other arguments, as a person types it into a shell.

    A launcher such as torchrun, which may have started this process, is not part of it.
    """
    program = sys.argv[0]
    own = ["python", program] if program.endswith(".py") else [os.path.basename(program)]  # noqa: PTH119 - of text
    return shlex.join([*own, *arguments])


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int = 0
    """The number of this process; the first is 0."""

    n_ranks: int = 1
    """How many processes share the run."""

    _group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that makes the run folder, joins the results and prints."""
        return self.rank == 0

    def gathered(self, mine: T) -> list[T]:
        """What each process gives, in the order of the ranks. All processes must call it; it waits for the slowest."""
        if self.n_ranks == 1:
            return [mine]
        given: list[Any] = [None] * self.n_ranks
        dist.all_gather_object(given, mine, group=self._group)
        return given

    def from_first(self, mine: T | None) -> T:
        """What the first process gives. The others wait for it."""
        first = self.gathered(mine if self.is_first else None)[0]
        assert first is not None
        return first


def join_ranks() -> Ranks:
    """This process among those that a launcher started together. Without a launcher it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return Ranks()
    if not dist.is_initialized():
        import torch.distributed.nn  # noqa: F401  imported later, its defaults would hold the group for ever

        dist.init_process_group("gloo", timeout=PATIENCE)
        atexit.register(_leave)
    group = None if dist.get_backend() == "gloo" else _gloo_group()
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


def end_group_at_exit() -> None:
    """Have the group of all processes, which another library is about to start, ended before the interpreter ends."""
    import torch.distributed.nn  # noqa: F401  imported later, its defaults would hold the group for ever

    atexit.register(_leave)


def _leave() -> None:
    """End gloo's threads before the interpreter ends: they give tensors back to Python, and the process would end in SIGABRT."""
    if dist.is_initialized():
        dist.destroy_process_group()


_group_of_all: Any = None


def _gloo_group() -> Any:
    """A gloo group of all processes, beside the group of the caller. It is made once."""
    global _group_of_all
    _group_of_all = _group_of_all or dist.new_group(backend="gloo", timeout=PATIENCE)
    return _group_of_all


def own_device(device: str = "auto") -> str:
    """The device that was asked for. For `auto` it is the GPU of this process, when a launcher gave each process its own."""
    local = os.environ.get("LOCAL_RANK")
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"

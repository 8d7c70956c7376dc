"""Out-of-memory errors: recognised, the memory freed, and the caller told to try with less."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

droppable: list[Callable[[], None]] = []
"""Called when memory is full: each drops what is kept for speed alone."""


def unless_too_large(compute: Callable[[], T], *, can_be_smaller: bool = True) -> T | None:
    """What `compute` returns; None when it does not fit into memory, which is freed then.

    can_be_smaller: whether the caller can try again with less. If not, the error of torch is raised.
    """
    try:
        return compute()
    except RuntimeError as failure:
        if not can_be_smaller or not _is_out_of_memory(failure):
            raise
    free_memory()  # here, outside of the except clause, which would hold on to the tensors of the failed call
    return None


def free_memory() -> None:
    """Drop what is kept for speed alone, and give the memory that torch holds in reserve back to the GPU."""
    for drop in droppable:
        drop()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(failure: BaseException) -> bool:
    messages = (
        "not enough memory",  # on Windows
        "DefaultCPUAllocator: can't allocate",  # on Linux
        "CUDA error: out of memory",  # of CUDA itself, where torch's allocator was not asked
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(failure, torch.OutOfMemoryError) or any(message in str(failure) for message in messages)

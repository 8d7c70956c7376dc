"""The recorded steps that are kept for later batches, within a bound on their memory.

Does not know what a key stands for. Steps are forgotten with their model.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import nn

from AutomaticEval.capture.graph.recorded_step import RecordedStep
from AutomaticEval.capture.memory import droppable

SHARE = 4
"""The steps that are kept have at most one part in so many of a GPU's memory."""
MOST = 32
"""The most steps that are kept of a model."""
WITHOUT_GPU = 2**30
"""That bound, in bytes, on a device whose memory is not known."""

_kept: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, RecordedStep]] = weakref.WeakKeyDictionary()
"""Inner model -> key -> step; the step that was used last comes last."""


def taken(model: nn.Module, key: Hashable) -> RecordedStep | None:
    """The step that was kept under a key, which is kept no longer; None when there is none. Whoever used it whole gives it back by `keep`."""
    return _kept.get(model, {}).pop(key, None)


def keep(model: nn.Module, key: Hashable, step: RecordedStep) -> None:
    """Keep a step for later batches. The steps that were not used for the longest time go when they are too large together."""
    own = _kept.setdefault(model, {})
    own[key] = step
    bound = _bound(next(model.parameters()).device)
    while len(own) > MOST or (own and sum(each.size_bytes for each in own.values()) > bound):
        del own[next(iter(own))]


def are_any() -> bool:
    """Whether any step is kept."""
    return any(_kept.values())


def drop_all() -> None:
    """Forget every step that is kept, and so free its memory."""
    _kept.clear()


droppable.append(drop_all)


def _bound(device: torch.device) -> int:
    """The most bytes of all steps of a model."""
    if device.type != "cuda":
        return WITHOUT_GPU
    return int(torch.cuda.get_device_properties(device).total_memory) // SHARE

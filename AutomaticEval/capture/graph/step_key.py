"""What a recorded step depends on beside its inputs: two batches with one key may use one graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from AutomaticEval.models.edit import Edit
from AutomaticEval.models.edited_models import active_edits
from AutomaticEval.models.hook_handles import module_of
from AutomaticEval.models.layout import Tap
from AutomaticEval.models.recording import Recording


def state_of(model: nn.Module) -> Hashable:
    """Everything of an inner model that decides which operations a forward is, and on which memory: the attention kernel, how experts are
    computed, adapters, edits, and the address of every weight."""
    config = getattr(model, "config", None)
    kernels = tuple(getattr(config, f"_{name}_implementation", None) for name in ("attn", "experts"))
    adapters = tuple(
        (name, tuple(each.active_adapters), each.disable_adapters, tuple(each.merged_adapters), _scales(each))
        for name, each in model.named_modules()
        if hasattr(each, "merged_adapters")
    )
    tensors = [*model.parameters(), *model.buffers()]
    addresses = tuple((each.data_ptr(), each.shape, each.dtype) for each in tensors)
    edits = tuple((each.described, _function(each.edit.change)) for each in active_edits(model))
    return kernels, adapters, edits, addresses, torch.is_inference_mode_enabled()


def read_by(recording: Recording | None) -> Hashable:
    """What the hooks of a recording read in a step, and in which dtype it is kept. None: nothing is captured."""
    if recording is None:
        return None
    taps = recording.taps.items()
    return tuple(
        (key, tap.module, tap.end, tap.earlier, tap.elements, tap.scale, tap.columns, _mark(tap)) for key, tap in taps
    ), recording.dtype


def _function(change: Callable[..., Any]) -> Hashable:
    """What tells the function of an edit from others; None for one that the edit's description tells whole. It does not keep the function alive."""
    return None if module_of(change) == Edit.__module__ else weakref.ref(change)


def _scales(adapted: Any) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, float(scale)) for name, scale in getattr(adapted, "scaling", {}).items()))


def _mark(tap: Tap) -> Hashable:
    return None if tap.then is None else tap.then.mark

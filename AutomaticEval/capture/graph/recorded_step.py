"""One decode step of a model, recorded into a graph and replayed for every token of a batch.

Does not know what is generated, nor which step comes after which. It never holds the model: whoever keeps steps may key them by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from AutomaticEval.capture.graph.device_graph import DeviceGraph, reserved_bytes
from AutomaticEval.capture.graph.outside_memory import OutsideMemory
from AutomaticEval.capture.graph.static_cache import lengths_of, size_bytes
from AutomaticEval.errors import GraphUnsuitable
from AutomaticEval.models.recording import Recording
from AutomaticEval.models.transfer.ring import wait_until_sent
from AutomaticEval.models.transfer.step import Step

N_WARM_UPS = 2
"""Forwards before the recording. Libraries make their handles and choose their kernels in the first ones."""
Inputs = Mapping[str, Any]


class RecordedStep:
    """A decode step over one cache. It is recorded by its first call.

    new_graph: makes the graph. cache: the keys and values that every step reads and extends.
    """

    def __init__(self, new_graph: Callable[[], DeviceGraph], cache: StaticCache) -> None:
        self.cache = cache
        self._holds: list[Tensor] = []
        """What must live as long as the graph does, because the graph reads its memory."""
        self._graph_bytes = 0
        self._new_graph = new_graph
        self._graph: DeviceGraph | None = None
        self._static: dict[tuple[str, ...], Tensor] = {}
        """The tensors that the graph reads its inputs from, by their paths in the arguments."""
        self._constants: dict[tuple[str, ...], Any] = {}
        """The arguments that are no tensors. They are part of what was recorded."""
        self._out: Any = None
        self._seen: Step | None = None

    @property
    def size_bytes(self) -> int:
        """The memory of the keys and values, and that which the recording took."""
        return size_bytes(self.cache) + self._graph_bytes

    def run(self, model: Any, recording: Recording | None, inputs: Inputs) -> Any:
        """The output of a step, as model(**inputs) would give it; the next step overwrites it.

        recording: what captures the batch, or None. It hears what was fed. Raises GraphUnsuitable when the inputs are not of the kind that
        was recorded; RuntimeError when the model cannot be recorded.
        """
        if self._graph is None:
            self._graph = self._record(model, recording, inputs)
        tensors, constants = _divided(inputs)
        self._refuse_others(tensors, constants)
        for path, tensor in tensors.items():
            self._static[path].copy_(tensor)
        self._graph.replay()
        if recording is not None and self._seen is not None:
            recording.replayed(self._seen, inputs["input_ids"])
        return self._out

    def _record(self, model: Any, recording: Recording | None, inputs: Inputs) -> DeviceGraph:
        tensors, self._constants = _divided(inputs)
        self._static = {path: tensor.clone() for path, tensor in tensors.items()}
        given = _with(inputs, self._static)
        graph = self._new_graph()
        with _unheard(recording):
            for how in (*[graph.warming] * (N_WARM_UPS - 1), graph.rehearsing):
                with self._lengths_put_back(), how():
                    model(**given)
        wait_until_sent()  # a copy to the host would be refused while a graph is recorded
        device = inputs["input_ids"].device
        outside, before = OutsideMemory(), reserved_bytes(device)
        with self._lengths_put_back(), _taping(recording, device) as self._seen, graph.recording(), outside:
            self._out = model(**given)
        self._holds, self._graph_bytes = outside.tensors, max(0, reserved_bytes(device) - before)
        return graph

    @contextmanager
    def _lengths_put_back(self) -> Iterator[None]:
        """Each forward makes the cache one column longer. The next one is to fill the same column."""
        lengths = lengths_of(self.cache)
        before = [each.clone() for each in lengths]
        try:
            yield
        finally:
            for length, old in zip(lengths, before, strict=True):
                length.copy_(old)

    def _refuse_others(
        self, tensors: Mapping[tuple[str, ...], Tensor], constants: Mapping[tuple[str, ...], Any]
    ) -> None:
        """Raises GraphUnsuitable for inputs of another kind than those that were recorded."""
        shapes, recorded = (
            {path: (tensor.shape, tensor.dtype) for path, tensor in each.items()} for each in (tensors, self._static)
        )
        if shapes != recorded or not _are_same(constants, self._constants):
            changed = sorted(
                ".".join(path) for path in shapes.keys() | recorded.keys() if shapes.get(path) != recorded.get(path)
            )
            named = ", ".join(changed) or "its settings"
            raise GraphUnsuitable(
                f"a graph of a decode step was recorded, and {named} changed from one step to the next; use --generation eager."
            )


def _divided(inputs: Inputs) -> tuple[dict[tuple[str, ...], Tensor], dict[tuple[str, ...], Any]]:
    """The tensors among some arguments by their paths, and all else. A mask may be one tensor, or a dict of one for each kind of layer."""
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in inputs.items():
        flat |= {(name, kind): each for kind, each in value.items()} if type(value) is dict else {(name,): value}
    tensors = {path: value for path, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {path: value for path, value in flat.items() if path not in tensors}


def _with(inputs: Inputs, tensors: Mapping[tuple[str, ...], Tensor]) -> dict[str, Any]:
    """The arguments with other tensors in the places of their own."""
    return {
        name: {kind: tensors.get((name, kind), each) for kind, each in value.items()}
        if type(value) is dict
        else tensors.get((name,), value)
        for name, value in inputs.items()
    }


def _are_same(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[path] or value == other[path] for path, value in one.items()
    )


def _unheard(recording: Recording | None) -> AbstractContextManager[Any]:
    return nullcontext() if recording is None else recording.ignoring()


def _taping(recording: Recording | None, device: torch.device) -> AbstractContextManager[Step | None]:
    return nullcontext() if recording is None else recording.taping(device)

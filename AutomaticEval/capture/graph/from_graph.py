"""`from_graph`: put it around a model's `generate`, and every decode step is replayed from a graph.

transformers' own loop runs: its processors and stopping criteria, its sampling and its prefill. With a static cache it asks the model for the
function that runs a step; this module gives the answer. Does not know whether a model can be served so (`way.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import CompileConfig

from AutomaticEval.capture.graph import device_graph, kept_steps
from AutomaticEval.capture.graph.recorded_step import RecordedStep
from AutomaticEval.capture.graph.static_cache import fill, full_length_cache, rounded_up
from AutomaticEval.capture.graph.step_key import read_by, state_of
from AutomaticEval.capture.tree.shared_prompt import Prefix
from AutomaticEval.models.architecture.forward_call import alone_with, cache_name, input_device
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.recording import Recording
from AutomaticEval.models.tokens.parallelism import keeping_parallelism


@dataclass(frozen=True)
class GraphBatch:
    """A batch whose answers are generated from a graph."""

    n_rows: int
    n_columns: int
    """The most columns of the batch, padding, prompts and answers together."""

    recording: Recording | None = None
    """What captures the batch; None captures nothing."""

    prefix: Prefix | None = None
    """What the prompts begin with, computed before."""


@contextmanager
def from_graph(model: Any, batch: GraphBatch, *, is_kept: bool = True) -> Iterator[dict[str, Any]]:
    """Inside, `model.generate` replays its decode steps, when it is given the arguments that this yields.

    is_kept: whether a later batch may use the graph. Raises GraphUnsuitable when the inputs of a step are not of the kind that was recorded.
    """
    whole = inner(model)
    with alone_with(model):
        key = (batch.n_rows, rounded_up(batch.n_columns), read_by(batch.recording), state_of(whole))
        step = kept_steps.taken(whole, key) or _new_step(model, batch)
        if batch.prefix is not None:
            fill(step.cache, batch.prefix.cached, batch.prefix.n_tokens, batch.n_rows)
        with _asked_for(whole, lambda **inputs: step.run(whole, batch.recording, inputs)):
            yield {str(cache_name(model)): step.cache, "compile_config": _on_any_device(), "disable_compile": False}
        step.cache.reset()  # in place: the graph knows its addresses
        if is_kept:
            kept_steps.keep(whole, key, step)


def _new_step(model: Any, batch: GraphBatch) -> RecordedStep:
    new_graph = device_graph.graphs_of(input_device(model))
    assert new_graph is not None, f"{input_device(model)} has no graphs"
    return RecordedStep(new_graph, full_length_cache(inner(model), rounded_up(batch.n_columns)))


@contextmanager
def _asked_for(whole: Any, step: Any) -> Iterator[None]:
    """transformers gets `step` when it asks an inner model for the function of a decode step."""
    with keeping_parallelism():
        try:
            whole.get_compiled_call = lambda config: step
            yield
        finally:
            whole.__dict__.pop("get_compiled_call", None)


def _on_any_device() -> CompileConfig:
    """Has transformers ask for the function of a step on every device. Nothing is compiled."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config

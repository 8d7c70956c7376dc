"""`way_of`: whether answers are generated from a graph or step by step, as it was asked for and as the model can be served.

The same model in the same state goes the same way, captured or not. What decides it is found once, and said once.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from AutomaticEval.capture.graph import device_graph
from AutomaticEval.capture.graph.self_check import why_unequal
from AutomaticEval.capture.graph.step_key import state_of
from AutomaticEval.capture.graph.unsuited import why_not
from AutomaticEval.errors import DeviceUnavailable, warn
from AutomaticEval.models.architecture.forward_call import alone_with, input_device
from AutomaticEval.models.architecture.inner_model import inner

FAILED = "eager, because the self-check of the graph failed"
"""What settings say of such a run."""
MOST_STATES = 16
"""How many states of a model are remembered with what the self-check said of them."""


class Way(NamedTuple):
    """How answers are generated."""

    kind: Literal["graph", "eager"]
    failed: bool = False
    """Whether the self-check found that the graph gives other numbers."""

    @property
    def settings(self) -> dict[str, str]:
        """What the settings of a run say of it. They say nothing of eager, as in runs from before there were graphs."""
        if self.failed:
            return {"generation": FAILED}
        return {"generation": self.kind} if self.kind == "graph" else {}


EAGER = Way("eager")

_checked: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, str | None]] = weakref.WeakKeyDictionary()
"""Inner model -> its state -> what the self-check found; None for nothing."""
_said: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def way_of(model: Any, wanted: str, given: Mapping[str, Any]) -> Way:
    """How a model's answers are generated.

    wanted: graph, eager or auto (a graph, on a device that has them). given: the arguments for transformers' `generate`.
    Warns, once a reason, when there is no graph although the device has them. Raises DeviceUnavailable when a graph was asked for on a device
    without them.
    """
    if wanted == "eager":
        return EAGER
    refuse_graphless(model, wanted)
    if device_graph.graphs_of(input_device(model)) is None:
        return EAGER
    with alone_with(model):
        reason = why_not(model, given)
        if reason is not None:
            _say(model, reason)
            return EAGER
        found = _self_check(model)
        if found is not None:
            _say(model, found)
            return Way("eager", failed=True)
    return Way("graph")


def refuse_graphless(model: Any, wanted: str) -> None:
    """Raises DeviceUnavailable when a graph was asked for by name and the model's device has none."""
    device = input_device(model)
    if wanted == "graph" and device_graph.graphs_of(device) is None:
        raise DeviceUnavailable(
            f"--generation graph needs a CUDA GPU, and the model is on {device}; write --generation auto, which takes a graph where there is one, "
            "or move the model."
        )


def _self_check(model: Any) -> str | None:
    """What the self-check finds of a model in its present state. Each state is checked once."""
    whole = inner(model)
    known, state = _checked.setdefault(whole, {}), state_of(whole)
    if state not in known:
        if len(known) >= MOST_STATES:
            del known[next(iter(known))]
        known[state] = why_unequal(model)
    return known[state]


def _say(model: Any, reason: str) -> None:
    """Warn, each reason once a model."""
    said = _said.setdefault(inner(model), set())
    if reason not in said:
        said.add(reason)
        name = type(inner(model)).__name__
        warn(f"Generating step by step, as --generation eager does: {name}: {reason}")

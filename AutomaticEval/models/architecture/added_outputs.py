"""The sum of what several modules of a block give in one forward, such as a mixture of experts and the MLP that all tokens share (Granite 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.architecture.forward_call import tensor_of, with_tensor
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Tap


class AddedOutputs:
    """Holds what the earlier modules of a tap gave until its own module has run. For a tap without earlier modules it does nothing.

    With `moves` the earlier modules hand on zeros instead, so that what the tap's own module hands on is the whole sum, to the last bit.
    """

    def __init__(self, hooks: Hooks, model: nn.Module, tap: Tap, *, moves: bool = False) -> None:
        self._tap = tap
        self._given: dict[str, Tensor] = {}
        for path in tap.earlier:
            self._install(hooks, model.get_submodule(path), path, moves=moves)

    def _install(self, hooks: Hooks, module: nn.Module, path: str, *, moves: bool) -> None:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            value = tensor_of(output)
            if value is None:
                raise CaptureError(f"{path} gave no tensor, which is added to what {self._tap.module} gives.")
            self._given[path] = value
            return with_tensor(output, torch.zeros_like(value)) if moves else None

        hooks.after(module, after, prepend=moves)

    def with_last(self, value: Tensor | None) -> Tensor | None:
        """The sum, from what the tap's own module gave. Each output is forgotten. Raises CaptureError when an earlier module did not run."""
        if not self._tap.earlier or value is None:
            return value
        lacking = [path for path in self._tap.earlier if path not in self._given]
        if lacking:
            raise CaptureError(f"{lacking[0]} did not run before {self._tap.module}, to whose output its own is added.")
        return self._tap.summed([*(self._given.pop(path) for path in self._tap.earlier), value])

"""Hooks that are taken away again, wherever an interrupt falls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn


class Hooks:
    """The hooks of one with, which its end removes.

    Each is noted before it is registered, so that none is unknown when an interrupt (KeyboardInterrupt) falls between the two.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[nn.Module, Callable[..., Any]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], **how: bool) -> None:
        """Call hook(module, args, kwargs) before each forward of the module. how: as of torch's `register_forward_pre_hook`."""
        module.register_forward_pre_hook(self._note(module, hook), with_kwargs=True, **how)

    def after(self, module: nn.Module, hook: Callable[..., Any], **how: bool) -> None:
        """Call hook(module, args, output) after each forward of the module. how: as of torch's `register_forward_hook`."""
        module.register_forward_hook(self._note(module, hook), **how)

    def _note(self, module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
        own = partial(hook)  # a new object, as an outer with may have registered the same function
        self._noted.append((module, own))
        return own

    def remove(self) -> None:
        """Remove the hooks. After an interrupt inside it, a second call removes the rest."""
        for module, hook in getattr(self, "_noted", ()):  # an interrupt may have fallen into __init__
            for hooks, marks in (
                (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
                (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            ):
                for number in [number for number, each in hooks.items() if each is hook]:
                    for mark in marks:
                        mark.pop(number, None)
                    del hooks[number]
        self._noted = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.remove()
        finally:
            self.remove()

    def __del__(self) -> None:
        self.remove()  # an interrupt may have fallen before the first line of __exit__

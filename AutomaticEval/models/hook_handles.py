"""Hooks that are always removed again, even when an interrupt comes at the worst moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn


def module_of(hook: Callable[..., Any]) -> str:
    """The name of the module in which a hook was written; "" when it does not say."""
    return getattr(hook.func if isinstance(hook, partial) else hook, "__module__", None) or ""


class Hooks:
    """The hooks of one `with` block. The end of the block removes them.

    Each hook is noted before it is registered, so that none is forgotten when an interrupt (KeyboardInterrupt) comes between the two.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[nn.Module, Callable[..., Any]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], **how: bool) -> None:
        """Call hook(module, args, kwargs) before each forward of the module. how: further arguments of torch's `register_forward_pre_hook`."""
        module.register_forward_pre_hook(self._note(module, hook), with_kwargs=True, **how)

    def after(self, module: nn.Module, hook: Callable[..., Any], **how: bool) -> None:
        """Call hook(module, args, output) after each forward of the module. how: further arguments of torch's `register_forward_hook`."""
        module.register_forward_hook(self._note(module, hook), **how)

    def _note(self, module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
        own = partial(hook)  # a new object, because an outer block may have registered the same function
        self._noted.append((module, own))
        return own

    def remove(self) -> None:
        """Remove the hooks. When an interrupt stops this, a second call removes the rest."""
        for module, hook in getattr(self, "_noted", ()):  # __init__ may have been interrupted
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
        self.remove()  # __exit__ may have been interrupted before its first line

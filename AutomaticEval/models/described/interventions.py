"""What in a model depends on what: small forwards in which something is changed at the first token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from AutomaticEval.models.architecture.forward_call import input_of, tensor_of, with_cache, with_tensor
from AutomaticEval.models.described.plain_module import callable_as_ours
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Tap


def mixes_positions(model: Any, ids: Tensor, paths: Iterable[str]) -> dict[str, bool]:
    """Path -> whether what the module gives at a token depends on what it is given at the token before.

    Each module is called a second time by itself, with another first token. A module that did not run is not in the result.
    """
    mixes: dict[str, bool] = {}
    with Hooks() as hooks, torch.no_grad():
        for path in paths:
            _ask_again(hooks, model.get_submodule(path), path, mixes)
        _forward(model, ids)
    return mixes


def _ask_again(hooks: Hooks, module: nn.Module, path: str, mixes: dict[str, bool]) -> None:
    given: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[:] = [(args, kwargs)]

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own, named = given[0]
        value, gave = input_of(own, named), tensor_of(output)
        if value is None or gave is None:
            return

        def changed(each: Any) -> Any:
            return _with_other_first(each) if isinstance(each, Tensor) and each.shape == value.shape else each

        again = tensor_of(module.forward(*tree_map(changed, own), **tree_map(changed, named)))
        if again is None:
            return
        later, later_again = (each.reshape(-1, each.shape[-1])[1:].double() for each in (gave, again))
        off = (later - later_again).abs().max().item()
        mixes[path] = off > 32 * torch.finfo(gave.dtype).eps * later.abs().max().item()

    hooks.before(module, before)
    hooks.after(module, after)


def _with_other_first(value: Tensor) -> Tensor:
    """The same rows, but for the first one. value: [1, pos, width] or [pos, width]."""
    changed = value.clone()
    rows = changed.view(-1, value.shape[-1])
    rows[0] = 1 - 2 * rows[0]
    return changed


def moved_by_first_token(model: Any, ids: Tensor, taps: Iterable[Tap], seen: Mapping[str, int]) -> dict[int, Tensor]:
    """What some modules are given once the value of taps, which are outputs, is another at the first token: number -> [1, pos, width].

    seen: module -> number.
    """
    found: dict[int, Tensor] = {}
    with Hooks() as hooks, torch.no_grad():
        for tap in taps:
            _change(hooks, model.get_submodule(tap.module), tap)
        for path, number in seen.items():
            _see(hooks, model.get_submodule(path), number, found)
        _forward(model, ids)
    return found


def _change(hooks: Hooks, module: nn.Module, tap: Tap) -> None:
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        value = tensor_of(output)
        assert value is not None
        return with_tensor(output, tap.put(value, _with_other_first(tap.take(value))))

    hooks.after(module, after)


def _see(hooks: Hooks, module: nn.Module, number: int, found: dict[int, Tensor]) -> None:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = input_of(args, kwargs)
        if value is not None:
            found[number] = value.detach().clone()

    hooks.before(module, before)


def _forward(model: Any, ids: Tensor) -> None:
    how = dict.fromkeys(with_cache(model), False)  # in a cache, the second call of a module would come after the first
    callable_as_ours(model)(input_ids=ids, **how)

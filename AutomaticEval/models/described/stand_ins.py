"""A forward without weights: what an activation is multiplied by is on the meta device, and the product is drawn at random.

Everything else is computed as the model's code says: additions, norms, the cache, how heads are cut. So whether a stream is the sum of what
its branches add is seen without a single weight. What the weights themselves decide is not seen.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

SMALL = 1 << 20
"""Of a weight on the meta device, a part with more numbers stays there when it is picked out, as the weights of one expert are."""
PICKING = ("index", "select", "index_select", "slice", "gather")
"""Operations that give a part of a weight."""

_making = threading.Lock()
_active: ContextVar[_StandIns | None] = ContextVar("_active", default=None)


def are_active() -> bool:
    """Whether forwards are run without weights just now."""
    return _active.get() is not None


def draws_so_far() -> Tensor | None:
    """Where the random numbers stand, for `repeating`; None when forwards are run with weights."""
    mode = _active.get()
    return None if mode is None else mode.random.get_state()


@contextmanager
def repeating(draws: Tensor | None) -> Iterator[None]:
    """Inside the with, a module that is run again gives what it gave before. draws: `draws_so_far` when it ran."""
    mode = _active.get()
    if mode is not None and draws is not None:
        mode.random.set_state(draws)
    yield


@contextmanager
def stand_ins() -> Iterator[None]:
    """Inside the with, an operation on activations and on weights of the meta device gives random numbers of the right shape on the CPU."""
    mode = _StandIns()
    token = _active.set(mode)
    try:
        with mode:
            yield
    finally:
        _active.reset(token)


class _StandIns(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        are_meta = {each.is_meta for each in _tensors((args, kwargs.values()))}
        if len(are_meta) < 2:  # activations alone, or weights alone
            return func(*args, **kwargs)
        out = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        is_part = func.overloadpacket.__name__ in PICKING
        return tree_map(lambda value: self._drawn(value, is_part=is_part), out)

    def _drawn(self, value: Any, *, is_part: bool) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or (is_part and value.numel() > SMALL):
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype)
        return torch.randn(value.shape, generator=self.random).to(value.dtype)


def _tensors(given: Any) -> Iterator[Tensor]:
    """The tensors in the arguments of an operation. torch's own way of finding them takes longer than the forward."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple | ValuesView):
            yield from _tensors(each)


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@contextmanager
def with_meta_weights() -> Iterator[None]:
    """Inside the with, modules that are made have their weights on the meta device. Those of one dimension are drawn on the CPU, and buffers are as ever."""
    stock, own_thread = nn.Module.register_parameter, threading.get_ident()
    random = torch.Generator().manual_seed(1)

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        parameter = param
        if parameter is not None and not parameter.is_meta and threading.get_ident() == own_thread:
            shape, dtype = parameter.shape, parameter.dtype
            drawn = (
                (1 + 0.1 * torch.randn(shape, generator=random)).to(dtype) if len(shape) < 2 else parameter.to("meta")
            )
            parameter = nn.Parameter(drawn, requires_grad=False)
        stock(self, name, parameter)

    with _making:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = stock  # type: ignore[method-assign]

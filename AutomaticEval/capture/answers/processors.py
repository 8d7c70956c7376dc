"""Logits processors of ours, around those that a model's `generate` makes for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from AutomaticEval.models.architecture.inner_model import inner

Processor = Callable[[Tensor, Tensor], Tensor]
"""Takes the token ids so far [batch, columns] and the logits of the next token [batch, d_vocab], and gives other logits."""

_ASKED = "_get_logits_processor"
"""The method by which transformers asks a model for its processors."""


@contextmanager
def processing(model: Any, *, first: Processor | None = None, last: Processor | None = None) -> Iterator[None]:
    """Inside, the model's `generate` calls `first` before its own processors, and `last` after all of them. It may be nested.

    A model that is never asked for processors, because its `generate` is its own, calls neither.
    """
    whole = inner(model)
    own, before = getattr(whole, _ASKED, None), whole.__dict__.get(_ASKED)
    if own is None:
        yield
        return

    def with_ours(*args: Any, **kwargs: Any) -> Any:
        every = own(*args, **kwargs)
        every[:0] = [] if first is None else [first]
        every.extend([] if last is None else [last])
        return every

    try:
        whole.__dict__[_ASKED] = with_ours
        yield
    finally:
        if before is None:
            whole.__dict__.pop(_ASKED, None)
        else:
            whole.__dict__[_ASKED] = before

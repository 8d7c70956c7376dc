"""Which models people have described, and how: remembered as long as the model lives."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from AutomaticEval.models.architecture.description import KNOWN, Description
from AutomaticEval.models.architecture.inner_model import inner

_described: weakref.WeakKeyDictionary[nn.Module, Description] = weakref.WeakKeyDictionary()
"""Inner model -> its description."""


def remember(model: nn.Module, description: Description | None) -> None:
    """From now on the parts of a model are found by this description; None forgets it."""
    if description is None:
        _described.pop(inner(model), None)
    else:
        _described[inner(model)] = description


def description_of(model: Any) -> Description:
    """How a model was described; KNOWN when nobody did."""
    return _described.get(inner(model), KNOWN)


def embedding_of(model: Any) -> Any:
    """The module that is given the token ids: the described one, or that of get_input_embeddings.

    Raises AttributeError and NotImplementedError where neither is there.
    """
    own = inner(model)
    path = next(iter(description_of(own).embedding), None)
    return model.get_input_embeddings() if path is None else own.get_submodule(path)

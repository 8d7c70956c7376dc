"""`PlainModule`: a decoder that is no transformers model, called as one.

The functions of this project call `model(input_ids=…)` and ask a model for its config, device, dtype and embedding. This wrapper answers for a module
that a person has described. It generates nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.described.remembered import embedding_of

OF_TRANSFORMERS = ("config", "get_input_embeddings", "dtype", "device")
"""What a transformers model has, and these functions ask it for."""


def lacking(model: nn.Module) -> list[str]:
    """What of a transformers model a module lacks."""
    own = inner(model)
    missing = [name for name in OF_TRANSFORMERS if not hasattr(own, name)]
    return missing or ([] if hasattr(own.config, "get_text_config") else ["config of transformers"])


def is_plain(model: nn.Module) -> bool:
    """Whether a module lacks something that a transformers model has."""
    return bool(lacking(model))


def callable_as_ours(model: nn.Module) -> Any:
    """The model as the functions of this project call it: itself, or the wrapper of a plain module."""
    return PlainModule(model) if is_plain(model) and not isinstance(model, PlainModule) else model


class PlainModule(nn.Module):
    """A plain module with a config, a device, a dtype and an embedding. `get_base_model` gives the module, whose sites are those of both.

    The module's forward takes the token ids [batch, pos] as its first argument, under any name.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = PretrainedConfig(name_or_path=type(module).__name__)
        self.training = False  # the module's own mode is asked
        self._takes = inspect.signature(module.forward).parameters

    def get_base_model(self) -> nn.Module:
        """The module."""
        return self.module

    def get_input_embeddings(self) -> Any:
        """The embedding that the description names."""
        return embedding_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first weight of floating point."""
        return next(each.dtype for each in self.module.parameters() if each.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first weight."""
        return next(self.module.parameters()).device

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """What the module returns. options: those that it does not take are left out; a mask that hides a token is never left out."""
        mask = options.get("attention_mask")
        if mask is not None and "attention_mask" not in self._takes and not bool(mask.all()):
            raise UnsupportedModel(
                f"{type(self.module).__name__} takes no attention_mask, so that sequences of different lengths cannot be run together; give them one by one."
            )
        return self.module(input_ids, **{name: value for name, value in options.items() if name in self._takes})

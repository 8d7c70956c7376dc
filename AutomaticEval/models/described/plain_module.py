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
from transformers.modeling_outputs import CausalLMOutput

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.forward_call import tensor_of
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.described.remembered import description_of, embedding_of
from AutomaticEval.models.hook_handles import Hooks

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


def _is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a call must give a parameter."""
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def refuse_plain(model: nn.Module, what: str) -> None:
    """Raises UnsupportedModel for a plain module. what: who needs what of a transformers model."""
    if is_plain(model):
        raise UnsupportedModel(
            f"{what}, and {type(inner(model)).__name__} is a plain module (no {', no '.join(lacking(model))}); its activations on texts can be captured."
        )


class PlainModule(nn.Module):
    """A plain module with a config, a device, a dtype and an embedding. `get_base_model` gives the module, whose sites are those of both.

    The module's forward takes the token ids [batch, pos] as its first argument, under any name, and nothing else that it must be given.
    Raises UnsupportedModel for another forward.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = PretrainedConfig(name_or_path=type(module).__name__)
        self.training = False  # the module's own mode is asked
        needed = [each for each in inspect.signature(module.forward).parameters.values() if _is_needed(each)]
        if len(needed) > 1:
            raise UnsupportedModel(
                f"the forward of {type(module).__name__} needs {', '.join(each.name for each in needed)}; a plain module is given the token ids alone. "
                "Put it into a module that adds the rest."
            )
        self._name = next((each.name for each in needed if each.kind is each.KEYWORD_ONLY), None)

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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> CausalLMOutput:
        """The logits of the module, which is given the ids alone: what else a transformers model is given means nothing to it.

        Raises UnsupportedModel for a mask that hides a token.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UnsupportedModel(
                f"{type(self.module).__name__} is a plain module, of which it is not known how it hides padding; give texts of one length, or one by one."
            )
        seen: list[Tensor | None] = []
        path = next(iter(description_of(self.module).lm_head), None)
        head = self.module if path is None else self.module.get_submodule(path)
        with Hooks() as hooks:
            hooks.after(head, lambda module, args, output: seen.append(tensor_of(output)))
            self.module(input_ids) if self._name is None else self.module(**{self._name: input_ids})
        return CausalLMOutput(logits=seen[-1] if seen else None)

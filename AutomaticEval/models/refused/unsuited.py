"""Which models are refused as a whole, before anything is read of them, and why."""

from __future__ import annotations

from torch import nn

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.forward_call import attends_both_ways, input_device, needed_besides_ids
from AutomaticEval.models.architecture.inner_model import inner, is_compiled, virtual_tokens
from AutomaticEval.models.described.given_config import text_config
from AutomaticEval.models.described.plain_module import is_plain
from AutomaticEval.models.divided.division import refuse_uneven


def refuse_virtual(model: nn.Module, what: str) -> None:
    """Raises UnsupportedModel for a model tuned by virtual tokens. what: what cannot be done with it."""
    virtual = virtual_tokens(model)
    if virtual is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} is tuned by virtual tokens ({virtual.method}), which stand before what is fed: {what} is not known to be "
            "right there. To leave them out, pass model.get_base_model(), or adapter='base'."
        )


def refuse_unready(model: nn.Module) -> None:
    """Raises UnsupportedModel for compiled models, models in training mode, and encoder-decoders."""
    whole = inner(model)
    for module in model.modules():  # the modules around the inner model come first
        if is_compiled(module):
            raise UnsupportedModel(
                f"{type(module).__name__} is compiled: hooks do not fire reliably. Pass the model before torch.compile."
            )
        if module is whole:
            break
    refuse_untrue(model)


def refuse_untrue(model: nn.Module) -> None:
    """Raises UnsupportedModel for models in training mode, where dropout changes every number, for encoder-decoders, for models that
    cannot be asked by text alone, or whose tokens attend to those behind them, and for a kernel of attention that cannot run."""
    name = type(model).__name__
    if any(module.training for module in model.modules()):
        raise UnsupportedModel(f"{name} is in training mode: dropout changes every value. Call model.eval() first.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are asked and captured.")
    if not is_plain(model):
        _refuse_unaskable(model, name)


def _refuse_unaskable(model: nn.Module, name: str) -> None:
    """Raises UnsupportedModel for a model of transformers of which text alone, or this machine, cannot get a true answer."""
    needed = needed_besides_ids(model)
    if needed:
        raise UnsupportedModel(
            f"{name} needs {' and '.join(needed)} in every forward; only models that take text alone are asked and captured."
        )
    kernel = getattr(text_config(inner(model)), "_attn_implementation", None)
    if kernel == "flex_attention" and input_device(model).type == "cpu":
        raise UnsupportedModel(
            f"{name} attends with flex_attention, which torch cannot compile for batches on a CPU; load it with attn_implementation='sdpa'."
        )
    refuse_uneven(model)
    both_ways = attends_both_ways(model)
    if both_ways is not None:
        raise UnsupportedModel(
            f"a token of {name} attends to the tokens behind it ({both_ways}), so that it sees the answer that it should predict, and its rows "
            "change with every token; only decoders are asked and captured."
        )

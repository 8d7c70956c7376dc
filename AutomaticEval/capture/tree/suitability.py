"""Which models can be scored over a prefix tree, and the check that one really was.

Models that are known to be unsuitable are refused beforehand. Others are found out by a comparison with a plain forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.capture.batch_independence import rope_limit
from AutomaticEval.capture.padding_probes import counts_from_zero, is_close
from AutomaticEval.errors import TreeUnsuitable
from AutomaticEval.models.architecture.forward_call import alone_with, cache_name, forward_takes, input_device
from AutomaticEval.models.architecture.inner_model import virtual_tokens
from AutomaticEval.models.edited_models import depends_on_position

FEWEST_TOKENS = 16
"""The fewest tokens for a forward over the tree. With fewer, scoring request by request is better."""
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers whose state is the keys and values of each token."""


def refuse_unsuitable(model: Any, longest: int) -> None:
    """Raises TreeUnsuitable for a model that cannot be scored over a prefix tree. longest: the most tokens that one request feeds."""
    reason = why_not(model, longest)
    if reason is not None:
        raise TreeUnsuitable(f"{type(model).__name__}: {reason}")


def why_not(model: Any, longest: int) -> str | None:
    """Why a model cannot be scored over a prefix tree; None when no reason is known. longest: the most tokens that one request feeds."""
    reason = why_not_masked(model, longest)
    limit = most_columns(model)
    if reason is None and limit is not None and limit - longest < FEWEST_TOKENS:
        return f"a request of {longest} tokens leaves no room for others in the {limit} that its attention spans."
    return reason


def why_not_masked(model: Any, longest: int) -> str | None:
    """Why sequences of up to `longest` tokens cannot stand side by side in one row, each with its own mask and positions; None when they can."""
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    takes = forward_takes(model)
    if depends_on_position(model):
        return "it is edited at some tokens only (positions or where), or by a function of several, so that requests cannot share tokens."
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder has no prefix to share."
    tuned = virtual_tokens(model)
    if tuned is not None:
        return f"its adapter ({tuned.method}) puts tokens of its own before every sequence."
    if getattr(model, "_is_stateful", False) or layers - ATTENTION_LAYERS:
        return "its state is not keys and values of each token."
    for name in ("position_ids", "attention_mask", "logits_to_keep"):
        if name not in takes:
            return f"its forward takes no {name}."
    if cache_name(model) is None:
        return "its forward takes no keys and values of earlier tokens."
    if getattr(config, "alibi", False):
        return "its attention depends on the distance between columns (ALiBi)."
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"the attention {config._attn_implementation} takes no mask of its own; sdpa and eager do."
    window = window_of(model)
    if window is not None and longest > window:
        return f"a request of {longest} tokens is longer than its attention window of {window}."
    limit = rope_limit(model)
    if limit is not None and longest > limit:
        return f"beyond {limit} tokens its positions depend on how many are fed at once."
    if not counts_from_zero(model):
        return "its positions do not begin at 0."
    return None


def window_of(model: Any) -> int | None:
    """The length of the shortest attention window of all layers, in tokens; None when every layer attends to all tokens."""
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    if layers and layers == {"full_attention"}:
        return None
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(window) for window in windows if window), default=None)


def most_columns(model: Any) -> int | None:
    """The most columns, cached ones included, that one forward may have; None without a limit.

    GPT-Neo has a limit, because its mask of local attention goes by columns, whatever mask it is given.
    """
    config = model.config
    if config.model_type != "gpt_neo":
        return None
    local = "local" in config.attention_layers
    return int(min(config.max_position_embeddings, config.window_size if local else config.max_position_embeddings))


def check_scores(model: Any, context: Sequence[int], continuation: Sequence[int], logprobs: Tensor) -> None:
    """Compare the log-probabilities of a continuation's tokens [n_continuation] with those of a plain forward.

    Raises TreeUnsuitable when one differs by more than rounding.
    """
    with torch.no_grad(), alone_with(model):
        ids = torch.tensor([[*context, *continuation[:-1]]], device=input_device(model))
        logits = model(ids, use_cache=False, logits_to_keep=len(logprobs)).logits[0]  # [n_continuation, d_vocab]
    plain = torch.log_softmax(logits.float(), -1).cpu()
    expected = plain.gather(1, torch.tensor(list(continuation))[:, None])[:, 0]
    if not is_close(model, logprobs, expected):
        raise TreeUnsuitable(
            f"{type(model).__name__}: over the prefix tree a continuation scored {float(logprobs.sum()):.5f}, in a plain forward "
            f"{float(expected.sum()):.5f}."
        )

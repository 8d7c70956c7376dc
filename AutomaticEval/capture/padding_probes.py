"""What padding and other rows of a batch do to a model's numbers, found by generating a few tokens, or known from tests.

Does not know which prompts are run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.models.architecture.forward_call import alone_with, few_ids, input_device
from AutomaticEval.models.architecture.inner_model import inner, virtual_tokens
from AutomaticEval.models.described.remembered import embedding_of

LOGIT_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a logit or log-probability may be from that of a plain forward, as a part of 1 + its size: as far as rounding explains."""
QUANTIZED_LOGIT_TOLERANCE = 1e-1
"""That for weights of 8 and 4 bits, which round differently in other batches."""
TESTED = frozenset(
    [
        "cohere",
        "falcon",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "stablelm",
        "starcoder2",
    ]
)
"""Model types whose attention is known to depend on mask and positions only, at any length, within the limits that this module and
`capture/tree/suitability.py` name."""
STEPS = 3
"""How many tokens are generated to see whether padding, or another row, changes them."""
LONGEST_TRIED = 2048
"""The most tokens of the longer row in such a try."""

_padding_changes: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_batches_are_harmless: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_counts_from_zero: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def is_tested(model: Any) -> bool:
    """Whether a model has a type that is TESTED, and a dtype and no adapter other than in those tests."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)  # Gemma 2 in float64 gives NaN beside padding
    return model.dtype in dtypes and model.config.model_type in TESTED and virtual_tokens(model) is None


def batches_are_harmless(model: Any) -> bool:
    """Whether a prompt has the same numbers beside another one of the same length, found by generating. Tested types are known to have them."""
    if is_tested(model):
        return True
    known = _computing(model)
    if known not in _batches_are_harmless:
        first, second = [5, 3, 7, 4], [2, 8, 6, 1]
        alone, beside = (_continued(model, rows)[0] for rows in ([first], [first, second]))
        _batches_are_harmless[known] = is_close(model, beside, alone)
    return _batches_are_harmless[known]


def padding_changes(model: Any) -> bool:
    """Whether padding before a prompt changes its numbers, found by generating. With tested types it is known not to."""
    if is_tested(model):
        return False
    known = _computing(model)
    if known not in _padding_changes:
        short, long = [5, 3, 7, 4], [each % 8 + 1 for each in range(_several_chunks(model))]
        alone, beside = (_continued(model, rows)[0] for rows in ([short], [short, long]))
        _padding_changes[known] = not is_close(model, beside, alone)
    return _padding_changes[known]


def _computing(model: Any) -> Any:
    """The module that what was found is known of: with a soft prompt it is that of the model around the inner one."""
    return inner(model) if virtual_tokens(model) is None else model


def _several_chunks(model: Any) -> int:
    """A number of tokens that is more than two chunks, for models that compute their states in chunks."""
    config = model.config.get_text_config(decoder=True).to_dict()
    sizes = [
        size for name, size in config.items() if name.endswith(("chunk_size", "block_size")) and isinstance(size, int)
    ]
    context = config.get("max_position_embeddings") or LONGEST_TRIED
    return min(2 * max([*sizes, 16]) + 16, context - STEPS, LONGEST_TRIED)


def counts_from_zero(model: Any) -> bool:
    """Whether the positions that a model makes by itself are 0, 1, …, found by forwards with and without these positions.

    Those of RoBERTa begin after the id of its padding token. Tested types count from 0.
    """
    if is_tested(model):
        return True
    if model not in _counts_from_zero:
        ids = few_ids(model, 4)
        with torch.no_grad(), alone_with(model):
            own = model(input_ids=ids).logits
            given = model(input_ids=ids, position_ids=torch.arange(4, device=ids.device)[None]).logits
        _counts_from_zero[model] = is_close(model, given, own)
    return _counts_from_zero[model]


def _continued(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """The logits of the tokens that a left-padded batch generates: [batch, STEPS, d_vocab], float32, on the CPU."""
    width = max(map(len, rows))
    n_tokens = embedding_of(model).weight.shape[0]
    padded = [[9] * (width - len(row)) + list(row) for row in rows]  # not 0, whose embedding may be zeros
    ids = torch.tensor(padded) % n_tokens
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = input_device(model)
    with torch.no_grad(), alone_with(model):
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            disable_compile=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.stack(list(out.logits), 1).float().cpu()


def is_close(model: Any, logits: Tensor, expected: Tensor) -> bool:
    """Whether logits or log-probabilities of a model differ by no more than rounding in its dtype explains. NaN is never close."""
    tolerance = LOGIT_TOLERANCES.get(model.dtype, QUANTIZED_LOGIT_TOLERANCE)
    if getattr(model, "quantization_method", None) is not None:
        tolerance = QUANTIZED_LOGIT_TOLERANCE
    differences = (logits.float() - expected.float()).abs()
    return bool((differences <= tolerance * (1 + expected.float().abs())).all())

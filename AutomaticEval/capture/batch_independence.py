"""Which sequences may be run in one batch because none of them, nor their padding, changes the numbers of another.

Some models and some settings of a generation let padding or longer rows change a row. Then the batch is divided. Does not know what is read
of the forwards, nor why they are run.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.models.architecture.inner_model import virtual_tokens
from AutomaticEval.models.edited_models import depends_on_position
from AutomaticEval.models.layout import alone_with, few_ids, input_device

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
LOOKS_AT_SCORES_ONLY = frozenset(
    [
        *("do_sample", "temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("renormalize_logits", "remove_invalid_values", "suppress_tokens", "forced_eos_token_id"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "max_time"),
        *(
            "use_cache",
            "cache_implementation",
            "cache_config",
            "prefill_chunk_size",
            "disable_compile",
            "compile_config",
        ),
        *("attention_mask", "stopping_criteria", "transformers_version", "_from_model_config", "trust_remote_code"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    ]
)
"""Settings of transformers' `generate` that look at the scores of a row only, or at no row at all."""
NEUTRAL: Mapping[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "length_penalty": 1,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "early_stopping": False,
}
"""Values with which a setting of `generate` does nothing."""
STEPS = 3
"""How many tokens are generated to see whether padding, or another row, changes them."""
LONGEST_TRIED = 2048
"""The most tokens of the longer row in such a try."""


class Span(NamedTuple):
    """How many tokens of one row a model is fed."""

    first: int
    """The tokens of the first forward."""
    last: int
    """The most tokens of all forwards together."""


class Company(NamedTuple):
    """Which prompts may be answered in one batch because they do not change each other's numbers."""

    kind: Literal["any", "equal lengths", "none"] = "any"
    why: str = ""
    """The reason why not any."""


def apart(model: Any, spans: Sequence[Span], company: Company = Company()) -> list[list[int]]:
    """The rows of a batch, by number, in groups whose rows do not change each other's numbers. Usually there is one group.

    company: which rows may be together, apart from the limits of rotary positions. All rows stay together in a model that is edited at certain
    rows and columns, because those are rows and columns of this batch.
    """
    limit = rope_limit(model)
    if depends_on_position(model) or (limit is None and company.kind == "any"):
        return [list(range(len(spans)))]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, span in enumerate(spans):
        by_company = {"any": None, "equal lengths": span.first, "none": row}[company.kind]
        groups.setdefault((by_company, _side(span, limit, row)), []).append(row)
    return list(groups.values())


def _side(span: Span, limit: int | None, row: int) -> str | int:
    """On which side of the limit a row stays. A row that crosses it is on a side of its own, which its number stands for."""
    if limit is None or span.last <= limit:
        return "short"
    return "long" if span.first > limit else row


def rope_limit(model: Any) -> int | None:
    """The number of tokens beyond which rotary positions depend on the longest row of a forward; None for models in which they never do."""
    config = model.config.get_text_config(decoder=True)
    limits = [
        int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in _ropes(getattr(config, "rope_parameters", None) or {})
        if rope.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)


def is_fed_again(model: Any, span: Span) -> bool:
    """Whether a model feeds the first tokens of a row again while it generates, as Phi-3 does when a row crosses its short context."""
    config, limit = model.config.get_text_config(decoder=True), rope_limit(model)
    return limit is not None and span.first <= limit < span.last and hasattr(config, "original_max_position_embeddings")


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary settings: one set for all layers, or one for each type of layer."""
    yield parameters
    yield from (each for each in parameters.values() if isinstance(each, dict))


def company_of(model: Any, given: Mapping[str, Any], spans: Sequence[Span]) -> Company:
    """Which of some prompts may be answered together.

    given: the settings that transformers' `generate` is given besides the checkpoint's own generation config.
    """
    if len(spans) == 1:
        return Company()
    if not batches_are_harmless(model):
        return Company("none", f"{type(model).__name__} computes other numbers in a batch, whatever is in it")
    if len({span.first for span in spans}) == 1:
        return Company()
    looking = settings_that_look(model, given)
    if looking:
        return Company("equal lengths", f"{', '.join(looking)} look at all tokens of a row, padding among them")
    if padding_changes(model):
        return Company("equal lengths", f"{type(model).__name__} takes padding into its state or positions")
    return Company()


def settings_that_look(model: Any, given: Mapping[str, Any]) -> list[str]:
    """The settings of a generation that look at the tokens of a row, and not only at its scores. Unknown settings count among them."""
    settings = {**model.generation_config.to_diff_dict(), **given}
    return sorted(
        name
        for name, value in settings.items()
        if name not in LOOKS_AT_SCORES_ONLY and value is not None and not _is_neutral(name, value)
    )


def _is_neutral(name: str, value: Any) -> bool:
    return name in NEUTRAL and isinstance(value, int | float) and value == NEUTRAL[name]


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
    if model not in _batches_are_harmless:
        first, second = [5, 3, 7, 4], [2, 8, 6, 1]
        alone, beside = (_continued(model, rows)[0] for rows in ([first], [first, second]))
        _batches_are_harmless[model] = is_close(model, beside, alone)
    return _batches_are_harmless[model]


def padding_changes(model: Any) -> bool:
    """Whether padding before a prompt changes its numbers, found by generating. With tested types it is known not to."""
    if is_tested(model):
        return False
    if model not in _padding_changes:
        short, long = [5, 3, 7, 4], [each % 8 + 1 for each in range(_several_chunks(model))]
        alone, beside = (_continued(model, rows)[0] for rows in ([short], [short, long]))
        _padding_changes[model] = not is_close(model, beside, alone)
    return _padding_changes[model]


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
    n_tokens = model.get_input_embeddings().weight.shape[0]
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

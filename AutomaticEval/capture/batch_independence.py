"""Which sequences may be run in one batch because none of them, nor their padding, changes the numbers of another.

Some models and some settings of a generation let padding or longer rows change a row. Then the batch is divided. Does not know what is read
of the forwards, nor why they are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from AutomaticEval.capture.padding_probes import batches_are_harmless, padding_changes
from AutomaticEval.models.architecture.inner_model import virtual_tokens
from AutomaticEval.models.edited_models import depends_on_batch

LOOKS_AT_SCORES_ONLY = frozenset(
    [
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "top_h",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "renormalize_logits",
        "remove_invalid_values",
        "suppress_tokens",
        "forced_eos_token_id",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_length",
        "max_new_tokens",
        "max_time",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "prefill_chunk_size",
        "disable_compile",
        "compile_config",
        "attention_mask",
        "stopping_criteria",
        "transformers_version",
        "_from_model_config",
        "trust_remote_code",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
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
    if depends_on_batch(model) or (limit is None and company.kind == "any"):
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
    virtual = virtual_tokens(model)
    return min((limit - (0 if virtual is None else virtual.n) for limit in limits), default=None)


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

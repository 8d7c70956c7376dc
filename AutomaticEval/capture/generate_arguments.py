"""transformers' own arguments of `generate`, by their own names, for the functions that ask one prompt.

An argument that leaves each forward the next token of one sequence is handed on. Any other is refused, because what the hooks see would not
be what was answered. Imports no heavy library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from AutomaticEval.capture.sampling import Sampling, SamplingKeywords
from AutomaticEval.errors import PromptError


class GenerateKeywords(TypedDict, total=False):
    """The arguments of transformers' `generate` that are handed on as they are; None is the model's own."""

    do_sample: bool | None
    """False is temperature=0. True samples; what is not given of temperature, top_p and top_k is the model's own, as in transformers."""
    generation_config: Any
    """A GenerationConfig of transformers, or a dict; keywords of the call go before its entries."""
    min_new_tokens: int | None
    min_length: int | None
    max_time: float | None
    stop_strings: str | list[str] | None
    min_p: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    sequence_bias: Any
    exponential_decay_length_penalty: tuple[int, float] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    renormalize_logits: bool | None
    remove_invalid_values: bool | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None


DRAWN = ("temperature", "top_p", "top_k")
"""The options of sampling that the model's own generation config may hold, too."""
OF_SAMPLING = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Arguments that greedy decoding ignores."""
HARMLESS: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "length_penalty": 1,
    "early_stopping": False,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "low_memory": False,
    "use_cache": True,
    "disable_compile": True,
    "is_assistant": False,
    "token_healing": False,
    "synced_gpus": False,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
}
"""Argument that is refused -> the value with which it does nothing, and is taken."""


def _for(why: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, why)


REFUSED: Mapping[str, str] = {
    **_for(
        "several sequences would share the rows of a forward, and one response is captured; leave it out",
        *("num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "length_penalty"),
        *("early_stopping", "constraints", "force_words_ids"),
    ),
    **_for(
        "tokens would be fed that are not in the response (assisted decoding); leave it out",
        *("assistant_model", "prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit", "is_assistant"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
    ),
    **_for(
        "it is another way of decoding, whose forwards are not one token after another; leave it out",
        *("penalty_alpha", "low_memory", "dola_layers", "custom_generate"),
    ),
    **_for(
        "each token would need a second forward, of other tokens; leave it out",
        *("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"),
    ),
    **_for(
        "keys and values are kept by the option generation (auto, graph or eager); leave it out",
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
        *("past_key_values", "compile_config", "disable_compile", "continuous_batching_config", "synced_gpus"),
    ),
    **_for(
        "the text is returned, and activation_data has what is captured (sites='logits' for logits); leave it out",
        *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    ),
    **_for(
        "the tokens are made of the prompt; leave it out",
        *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_healing"),
        "decoder_start_token_id",
    ),
    **_for(
        "it is code, which the settings of a file cannot record; leave it out",
        *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "watermarking_config"),
    ),
    "max_length": "it counts the prompt, too; write max_new_tokens",
}
"""Argument of transformers' `generate` -> why it is refused, and what to do."""


@dataclass(frozen=True)
class GenerateArguments(Sampling):
    """How the response is chosen, with further arguments of transformers' `generate`."""

    more: Mapping[str, Any] = field(default_factory=dict)
    """Those that `Sampling` has not."""

    of_model: tuple[str, ...] = ()
    """Those of DRAWN that are the model's own; `settled` finds them."""

    def kwargs(self) -> dict[str, Any]:
        return {**super().kwargs(), **self.more}

    def settings(self) -> dict[str, Any]:
        more = {"generate_arguments": dict(self.more)} if self.more else {}
        return {**super().settings(), **more}

    def settled(self, config: Any) -> GenerateArguments:
        """With the values of `of_model`: those of the model's generation config, or else transformers' own defaults.

        Raises PromptError when the model's own temperature is 0, which does not sample.
        """
        defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
        own = {name: getattr(config, name, None) for name in self.of_model}
        found = {name: defaults[name] if value is None else value for name, value in own.items()}
        if found.get("temperature") == 0:
            raise PromptError("do_sample=True samples, and the model's own temperature is 0; give a temperature.")
        return replace(self, **found, of_model=())


def take_generate_arguments(given: dict[str, Any]) -> GenerateArguments:
    """Remove from `given` the options of sampling and the arguments of transformers' `generate`, and return them.

    Raises PromptError for an argument that is refused, and for two that contradict each other.
    """
    names = [*SamplingKeywords.__annotations__, *GenerateKeywords.__annotations__, *REFUSED]
    own = {name: given.pop(name) for name in names if name in given}
    config = _entries(own.pop("generation_config", None))
    for name in [*own, *config]:
        _refuse(name, own[name] if name in own else config[name])
    own, config = _without_nones(own), _without_nones(config)
    draws = _draws(own, config)
    greedy = draws is False or (draws is None and "temperature" not in own)
    if greedy:
        config = {name: value for name, value in config.items() if name not in (*DRAWN, *OF_SAMPLING)}
        own["temperature"] = 0.0
    chosen = {**config, **own}
    chosen.pop("do_sample", None)
    if isinstance(
        chosen.get("sequence_bias"), Mapping
    ):  # whose keys no JSON can hold; transformers reads this form, too
        chosen["sequence_bias"] = [[list(tokens), bias] for tokens, bias in chosen["sequence_bias"].items()]
    of_model = tuple(name for name in DRAWN if name not in chosen) if draws else ()
    placeholder: dict[str, Any] = {"temperature": 1.0} if "temperature" in of_model else {}
    sampling = {name: chosen.pop(name) for name in SamplingKeywords.__annotations__ if name in chosen}
    arguments = GenerateArguments(**placeholder, **sampling, more=chosen, of_model=of_model)
    if greedy:
        _refuse_unused(own)  # of the keywords: a generation config may say how it would sample
    return arguments


def _refuse(name: str, value: Any) -> None:
    """Raises PromptError for an argument that is not served, unless its value does nothing."""
    does_nothing = value is None or (name in HARMLESS and isinstance(value, int | float) and value == HARMLESS[name])
    if name in REFUSED and not does_nothing:
        shown = f"={value!r}" if isinstance(value, bool | int | float | str) else ""
        raise PromptError(f"{name}{shown} cannot be served: {REFUSED[name]}.")


def _entries(config: Any) -> dict[str, Any]:
    """What a generation config says, without what it says of itself. Raises PromptError for what is none."""
    if config is None:
        return {}
    entries = config if isinstance(config, Mapping) else getattr(config, "to_diff_dict", dict)()
    if not isinstance(config, Mapping) and not hasattr(config, "to_diff_dict"):
        raise PromptError(
            f"generation_config is a {type(config).__name__}; pass a GenerationConfig of transformers, or a dict of its entries."
        )
    entries = {
        name: value for name, value in entries.items() if name not in ("transformers_version", "_from_model_config")
    }
    known = {*SamplingKeywords.__annotations__, *GenerateKeywords.__annotations__, *REFUSED} - {"generation_config"}
    for name in entries:
        if name not in known:
            raise PromptError(f"generation_config has an entry {name!r}, which is not known here; leave it out.")
    return entries


def _without_nones(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the arguments that are None, and those that do nothing: they leave the choice to the model or to us."""
    needed = ("max_new_tokens", "seed", "generation")  # which say themselves what None is
    return {
        name: value for name, value in given.items() if name in needed or (value is not None and name not in REFUSED)
    }


def _draws(own: Mapping[str, Any], config: Mapping[str, Any]) -> bool | None:
    """Whether do_sample asks for sampling, or for greedy decoding; None when nothing is said but by the temperature.

    own: the keywords. config: the entries of a generation config, over which keywords go. Raises PromptError for a contradiction.
    """
    draws, temperature = own.get("do_sample", config.get("do_sample")), own.get("temperature")
    if draws not in (None, True, False) or not isinstance(draws, bool | None):
        raise PromptError(f"do_sample is {draws!r}; write True or False.")
    if "do_sample" not in own and temperature is not None:
        return False if temperature == 0 else None if draws is None else True
    if draws is None and "temperature" in config:
        raise PromptError(
            f"generation_config has temperature={config['temperature']}, and does not say do_sample; add do_sample=True to sample, "
            "or do_sample=False."
        )
    if draws is False and temperature not in (None, 0):
        raise PromptError(
            f"do_sample=False is greedy decoding, and temperature={temperature} is for sampling; leave one of them out."
        )
    if draws and (temperature if temperature is not None else config.get("temperature")) == 0:
        raise PromptError("do_sample=True samples, and temperature=0 is greedy decoding; leave one of them out.")
    return draws


def _refuse_unused(own: Mapping[str, Any]) -> None:
    """Raises PromptError for a keyword that greedy decoding ignores."""
    plain = {"top_p": 1, "top_k": 0}  # with which sampling would draw from all tokens
    for name in (*OF_SAMPLING, *plain):
        if name in own and own[name] != plain.get(name):
            raise PromptError(
                f"{name} is for sampling, and this is greedy decoding; add do_sample=True, or leave it out."
            )

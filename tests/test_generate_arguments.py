"""transformers' own arguments of `generate`: handed on as transformers takes them, or refused by name; and the file says what was used."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.raw_hooks import raw_residuals
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from AutomaticEval import (
    answer_benchmark_question,
    generate_inference,
    generate_inference_with_activations,
    load_activations,
    load_model,
)
from AutomaticEval.capture.draws import random_numbers
from AutomaticEval.capture.generate_arguments import REFUSED, GenerateKeywords, take_generate_arguments
from AutomaticEval.capture.sampling import SamplingKeywords
from AutomaticEval.errors import ModelError, PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

PROMPT = "What is the capital of France?"


def theirs(loaded: LoadedModel, seed: int | None, **given: Any) -> list[int]:
    """What transformers' own `generate` answers, when it samples from its own probabilities by the draws of our seed."""
    ids = loaded.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    draws = random_numbers(seed or 0, "response", ids[0].tolist(), 0)

    def multinomial(probabilities: Tensor, num_samples: int) -> Tensor:
        cumulated = probabilities.double().cumsum(-1)
        return (cumulated <= draws.random() * cumulated[:, -1:]).sum(-1, keepdim=True)

    with patch.object(torch, "multinomial", multinomial):
        out = loaded.model.generate(ids, max_new_tokens=24, tokenizer=loaded.tokenizer, **given)
    return [int(token) for token in out[0, ids.shape[1] :]]


def ours(loaded: LoadedModel, seed: int | None = None, **given: Any) -> dict[str, Any]:
    how: dict[str, Any] = {"max_new_tokens": 24, "apply_chat_template": False, **given}
    text, data = generate_inference_with_activations(PROMPT, loaded.model, tokenizer=loaded.tokenizer, seed=seed, **how)
    assert generate_inference(PROMPT, loaded.model, tokenizer=loaded.tokenizer, seed=seed, **how) == text
    return data


SERVED: dict[str, dict[str, Any]] = {
    "do_sample=False": {"do_sample": False},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "min_new_tokens": 20},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "stop_strings": {"stop_strings": ["a", "e"]},
    "min_new_tokens": {"min_new_tokens": 20},
    "min_length": {"min_length": 30},
    "eos_token_id": {"eos_token_id": 334, "pad_token_id": 0},
    "bad_words_ids": {"bad_words_ids": [[5], [230], [40, 41]]},
    "suppress_tokens": {"suppress_tokens": list(range(40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(200))},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "sequence_bias": {"sequence_bias": {(7,): 50.0}},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "do_sample=True": {"do_sample": True},
    "min_p": {"do_sample": True, "temperature": 1.5, "min_p": 0.1, "top_k": 0},
    "typical_p": {"do_sample": True, "typical_p": 0.4, "top_p": 0.9},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.021, "eta_cutoff": 0.021},
    "top_h": {"do_sample": True, "top_h": 0.4},
}


@pytest.mark.parametrize("name", SERVED)
def test_answers_are_those_of_transformers_with_the_same_arguments(name: str, tiny_llama: LoadedModel) -> None:
    """Of a model whose next tokens are all nearly as likely, so that each argument changes the answer; and the rows are the model's."""
    given = SERVED[name]
    seed = 3 if given.get("do_sample") else None
    expected = theirs(tiny_llama, seed, **given)
    data = ours(tiny_llama, seed, **given)
    assert data["generated_ids"].tolist() == expected
    raw = raw_residuals(tiny_llama.model, tiny_llama.name, data["token_ids"].tolist())
    for key, rows in data["activations"].items():
        torch.testing.assert_close(rows, raw[key], atol=1e-5, rtol=1e-5)


def test_the_given_arguments_are_no_empty_words(tiny_llama: LoadedModel) -> None:
    """Each of them changes what transformers answers, or the test above would tell nothing."""
    for name, given in SERVED.items():
        draws = bool(given.get("do_sample"))
        plain = theirs(tiny_llama, 3, do_sample=draws)
        if name not in ("do_sample=False", "do_sample=True", "min_length", "min_new_tokens"):
            assert theirs(tiny_llama, 3, **{"do_sample": draws, **given}) != plain, name


@pytest.mark.parametrize("name", ["repetition_penalty", "stop_strings", "eos_token_id", "min_p", "bad_words_ids"])
def test_a_graph_honours_them(name: str, tapes: None, tiny_llama: LoadedModel) -> None:
    given = SERVED[name]
    seed = 3 if given.get("do_sample") else None
    data = ours(tiny_llama, seed, generation="graph", **given)
    assert data["settings"]["generation"] == "graph"
    assert data["generated_ids"].tolist() == theirs(tiny_llama, seed, **given)


def test_what_sampling_leaves_out_is_the_models_own(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("temperature", 0.6), ("top_p", 0.8)):
        monkeypatch.setattr(tiny_llama.model.generation_config, name, value)
    data = ours(tiny_llama, 5, do_sample=True)
    assert [data["settings"][name] for name in ("temperature", "top_p", "top_k")] == [0.6, 0.8, 50]
    assert data["generated_ids"].tolist() == theirs(tiny_llama, 5, do_sample=True)
    own = ours(tiny_llama, 5, temperature=0.9)  # no word of transformers': nothing is the model's
    assert [own["settings"][name] for name in ("temperature", "top_p", "top_k")] == [0.9, 1.0, 0]


def test_a_generation_config_is_its_entries_and_keywords_go_first(tiny_llama: LoadedModel) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, repetition_penalty=1.3, max_new_tokens=6)
    how: dict[str, Any] = {"tokenizer": tiny_llama.tokenizer, "seed": 2, "apply_chat_template": False}
    _, data = generate_inference_with_activations(PROMPT, tiny_llama.model, generation_config=config, **how)
    settings = data["settings"]
    assert [settings[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")] == [0.7, 9, 1.0, 6]
    assert settings["generate_arguments"] == {"repetition_penalty": 1.3}
    assert len(data["generated_ids"]) == 6
    expected = theirs(tiny_llama, 2, do_sample=True, temperature=0.7, top_k=9, repetition_penalty=1.3)
    assert data["generated_ids"].tolist() == expected[:6]
    greedy = ours(tiny_llama, generation_config=config, do_sample=False, repetition_penalty=1.6)
    assert greedy["generated_ids"].tolist() == theirs(tiny_llama, None, repetition_penalty=1.6)
    assert greedy["settings"]["temperature"] == 0
    as_dict = ours(tiny_llama, generation_config={"repetition_penalty": 1.6})
    assert as_dict["generated_ids"].tolist() == greedy["generated_ids"].tolist()


def test_greedy_has_two_names() -> None:
    how: dict[str, Any] = {"max_new_tokens": 8}
    answers = [
        generate_inference_with_activations(PROMPT, "demo", **how, **given)
        for given in ({}, {"temperature": 0}, {"do_sample": False}, {"do_sample": False, "temperature": None})
    ]
    assert len({text for text, _ in answers}) == 1
    settings = [data["settings"] for _, data in answers]
    assert settings == [settings[0]] * len(settings)


def test_the_file_says_what_was_used(tmp_path: Path) -> None:
    given: dict[str, Any] = {"repetition_penalty": 1.2, "stop_strings": ["B."], "sequence_bias": {(7, 8): 1.0}}
    file = tmp_path / "x.h5"
    generate_inference_with_activations(PROMPT, "demo", file, max_new_tokens=12, num_beams=1, **given)
    settings = load_activations(file)["settings"]
    assert settings["generate_arguments"] == {**given, "sequence_bias": [[[7, 8], 1.0]]}
    generate_inference_with_activations(PROMPT, "demo", file, max_new_tokens=2, overwrite=True)
    assert "generate_arguments" not in load_activations(file)["settings"]


def test_a_question_takes_them_too() -> None:
    question: tuple[Any, ...] = ("What is the capital of France?", "demo")
    plain = answer_benchmark_question(*question, max_new_tokens=12)
    assert answer_benchmark_question(*question, max_new_tokens=12, suppress_tokens=[*range(300)]) != plain
    with pytest.raises(PromptError, match="num_beams=4 cannot be served"):
        answer_benchmark_question(*question, num_beams=4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_beams": 4}, "num_beams=4 cannot be served: several sequences"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences=3"),
        ({"assistant_model": object()}, "assistant_model cannot be served: .*assisted"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "another way of decoding"),
        ({"force_words_ids": [[3]]}, "force_words_ids cannot be served"),
        ({"guidance_scale": 1.5}, "second forward"),
        ({"use_cache": False}, "use_cache=False cannot be served"),
        ({"output_scores": True}, "activation_data has what is captured"),
        ({"logits_processor": [print]}, "logits_processor cannot be served: it is code"),
        ({"max_length": 30}, "write max_new_tokens"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2 cannot be served"),
        ({"generation_config": {"num_beam": 2}}, "entry 'num_beam'"),
        ({"generation_config": "greedy"}, "generation_config is a str"),
        ({"generation_config": GenerationConfig(temperature=0.7)}, "does not say do_sample"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True samples, and temperature=0"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample=False is greedy decoding, and temperature=0.7"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; write True or False"),
        ({"min_p": 0.1}, "min_p is for sampling"),
        ({"repetition_penalty": -1.0}, "refused one of repetition_penalty=-1.0: .*strictly positive"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=says):
        generate_inference_with_activations(PROMPT, "demo", tmp_path / "x.h5", max_new_tokens=4, **given)
    assert not (tmp_path / "x.h5").exists()


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"no option 'repetition_penality'\. Did you mean 'repetition_penalty'"):
        generate_inference(PROMPT, "demo", repetition_penality=1.2)  # type: ignore[call-arg]


def test_every_argument_of_transformers_is_known() -> None:
    """Handed on, or refused with a reason; a new version of transformers is met here."""
    of_config = {
        name for name in vars(GenerationConfig()) if name not in ("_from_model_config", "transformers_version")
    }
    of_generate = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    known = {*GenerateKeywords.__annotations__, *SamplingKeywords.__annotations__, *REFUSED}
    assert (of_config | of_generate) - known == set()
    assert not set(GenerateKeywords.__annotations__) & set(REFUSED)


def test_load_model_takes_the_options_that_all_doors_take() -> None:
    assert load_model("demo", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model("demo", dtype=torch.float32, device="cpu").model.dtype == torch.float32  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"no option 'dtpye'\. Did you mean 'dtype'"):
        load_model("demo", dtpye="float32")  # type: ignore[call-arg]
    with pytest.raises(ModelError, match="no dtype 'float23'"):
        load_model("demo", dtype="float23")
    loaded = load_model("demo")
    with pytest.raises(ModelError, match="dtype were given with a model that is loaded"):
        load_model(loaded, dtype="bfloat16")


@pytest.mark.parametrize(
    "given", [{"top_p": 0.5}, {"top_k": 5}, {"generation_config": {"do_sample": True, "temperature": 0.0}}]
)
def test_what_greedy_decoding_would_ignore_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"greedy decoding"):
        take_generate_arguments(dict(given))

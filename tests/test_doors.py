"""What may not be asked is refused at every door, captured or not: encoder-decoders, and models in training mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import CONFIGS, build
from helpers.tasks import loglikelihoods
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from AutomaticEval import (
    ActivationExtractor,
    ExtractSingleSample,
    FromHuggingFace,
    HFActivations,
    answer_benchmark_question,
    answer_benchmark_question_with_activations,
    evaluate_with_activations,
    generate_inference,
    generate_inference_with_activations,
    load_model,
    score_continuations,
)
from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

Door = Callable[[Any, Any, Path], Any]
DOORS: dict[str, Door] = {
    "load_model": lambda model, tok, folder: load_model(model, tokenizer=tok),
    "load_model, loaded": lambda model, tok, folder: load_model(LoadedModel(model, tok, "m")),
    "generate": lambda model, tok, folder: generate_inference("Hi", model, tokenizer=tok),
    "generate, captured": lambda model, tok, folder: generate_inference_with_activations("Hi", model, tokenizer=tok),
    "question": lambda model, tok, folder: answer_benchmark_question("Hi?", model, tokenizer=tok),
    "question, captured": lambda model, tok, folder: answer_benchmark_question_with_activations(
        "Hi?", model, activation_save_dir=folder, tokenizer=tok
    ),
    "score": lambda model, tok, folder: score_continuations([("a", " b")], model, tokenizer=tok),
    "score, captured": lambda model, tok, folder: score_continuations(
        [("a", " b")], model, tokenizer=tok, capture_activations=True
    ),
    "evaluate": lambda model, tok, folder: evaluate_with_activations(
        model, "demo", tokenizer=tok, limit=1, activation_save_dir=folder
    ),
    "HFActivations": lambda model, tok, folder: HFActivations(model, tokenizer=tok, activation_save_dir=folder),
    "lm-eval without capture": lambda model, tok, folder: CapturingHFLM(
        LoadedModel(model, tok, "m"), None, lambda samples: None
    ).loglikelihood(loglikelihoods([("a", " b")])),
    "features": lambda model, tok, folder: FromHuggingFace(model, 0, ["a text"], tokenizer=tok).extract_features(),
    "one text": lambda model, tok, folder: ExtractSingleSample(model, 0, tokenizer=tok),
    "heads": lambda model, tok, folder: ActivationExtractor(LoadedModel(model, tok, "m")).extract_activations(
        ["a text"]
    ),
}
SMALL = {"d_model": 32, "vocab_size": 400, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}


def training(name: str) -> Any:
    return build(CONFIGS[name]()).train()


def partly_training() -> Any:
    """One module alone is enough."""
    model = build(CONFIGS["llama"]())
    model.model.layers[1].mlp.train()
    return model


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "bart": (
        lambda: BartForConditionalGeneration(
            BartConfig(**SMALL, decoder_ffn_dim=32, max_position_embeddings=64)
        ).eval(),
        "is an encoder-decoder",
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ).eval(),
        "is an encoder-decoder",
    ),
    "gpt2 in training": (lambda: training("gpt2"), "is in training mode"),
    "a part in training": (partly_training, "is in training mode"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("door", list(DOORS))
def test_every_door_refuses(door: str, wrong: str, tokenizer: Any, tmp_path: Path) -> None:
    """By name, before anything is written, and with the model left as it was."""
    make, message = WRONG[wrong]
    model = make()
    modes = [module.training for module in model.modules()]
    with pytest.raises(UnsupportedModel, match=message):
        DOORS[door](model, tokenizer, tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("door", list(DOORS))
def test_every_door_takes_a_decoder(door: str, tokenizer: Any, tmp_path: Path) -> None:
    """The doors are real: what is refused above goes through here."""
    DOORS[door](build(CONFIGS["llama"]()), tokenizer, tmp_path)

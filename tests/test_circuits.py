"""A circuit that is known: an induction head, built by hand, is found by the public functions, and without it nothing is copied."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import within
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from AutomaticEval import ActivationExtractor, Edit, editing, score_continuations
from AutomaticEval.models.attention import reading_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

N = 32
"""Tokens, positions, and numbers of a head: each is a one-hot vector of this width."""
TOKEN, POSITION, BEFORE, ANSWER = (slice(i * N, (i + 1) * N) for i in range(4))
"""Where the stream holds the token, its position, the token before it, and what is answered."""
PREVIOUS, INDUCTION = (0, 1), (1, 2)
"""(layer, head): attends to the token before; attends to the token behind an earlier one like this, and copies it."""
WORDS = [
    "oak",
    "elm",
    "ash",
    "fir",
    "bay",
    "fig",
    "yew",
    "box",
    "hop",
    "rye",
    "oat",
    "pea",
    "ivy",
    "sun",
    "sky",
    "sea",
    "ice",
    "fog",
    "dew",
    "mud",
]
KEY = "rose"
EYE = torch.eye(N)


def write_head(model: Any, at: tuple[int, int], read: dict[str, tuple[slice, Tensor]], write: slice) -> None:
    """Give a head its weights. read: q, k, v -> where it reads, and [N, N], what it makes of it."""
    layer, head = at
    attention = model.transformer.h[layer].attn
    for part, (place, weights) in enumerate(read.values()):
        first = (part * 4 + head) * N
        attention.c_attn.weight[place, first : first + N] += weights
    attention.c_proj.weight[head * N : (head + 1) * N, write] += EYE


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["?", ".", KEY, *WORDS]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", eos_token="?", pad_token="?")


@pytest.fixture(scope="module")
def built(tokenizer: Any) -> LoadedModel:
    """Two layers of four heads, of which one in each does something; the others, and the MLPs, hold small random numbers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=N,
        n_embd=4 * N,
        n_layer=2,
        n_head=4,
        n_positions=N,
        n_inner=16,
        tie_word_embeddings=False,
        initializer_range=0.005,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight[:, TOKEN] += EYE
        model.transformer.wpe.weight[:, POSITION] += EYE
        model.lm_head.weight[:, ANSWER] += 3 * EYE
        next_one = EYE.roll(1, 1)  # the key of position s is the query of position s + 1
        write_head(
            model, PREVIOUS, {"q": (POSITION, 3 * EYE), "k": (POSITION, next_one), "v": (TOKEN, EYE / 8)}, BEFORE
        )
        write_head(model, INDUCTION, {"q": (TOKEN, 4 * EYE), "k": (BEFORE, EYE), "v": (TOKEN, EYE / 6)}, ANSWER)
    return LoadedModel(model, tokenizer, "built")


def repeated(n: int, seed: int = 0, length: int = 6) -> list[tuple[str, str]]:
    """(context, continuation): some words, and the first of them again; what follows is the second, and so on."""
    draw, pairs = random.Random(seed), []
    for _ in range(n):
        words = draw.sample(WORDS, length)
        known = draw.randrange(1, length - 1)
        pairs.append((" ".join([".", *words, *words[:known]]), " " + words[known]))
    return pairs


def copied(loaded: LoadedModel, pairs: Sequence[tuple[str, str]]) -> float:
    """How many continuations are the likeliest, as a part of all."""
    return float(
        np.mean([each.is_greedy for each in score_continuations(pairs, loaded.model, tokenizer=loaded.tokenizer)])
    )


def without(loaded: LoadedModel, head: tuple[int, int], pairs: Sequence[tuple[str, str]]) -> float:
    """The same without one head."""
    with editing(loaded, Edit.scale(f"layer_{head[0]}.z", 0.0, heads=[head[1]])):
        return copied(loaded, pairs)


def screened(model: LoadedModel, folder: Path) -> dict[str, tuple[int, int]]:
    """Which head `heads screen` ranks first by each of its three scores, for prompts in which the word before KEY comes again."""
    draw, lines = random.Random(5), []
    for number in range(10):
        a, other, *rest = draw.sample(WORDS, 9)
        at = number % 4
        for category, words in {"again": [a, KEY], "never": rest[-2:]}.items():
            text = [*rest[:at], *words, *rest[at:4], a if category == "again" else other]
            lines.append(json.dumps({"category": category, "text": " ".join([".", *text])}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "own.toml").write_text(f'prompts = "prompts.jsonl"\nneutral = "never"\n[keywords]\nagain = ["{KEY}"]\n')
    model.model.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    ran = within(
        "heads",
        "screen",
        "--model",
        str(folder / "model"),
        "--profile",
        str(folder / "own.toml"),
        "--output",
        str(folder / "scores.json"),
        "--permutations",
        "200",
        "--target",
        KEY,
        "--against",
        "sun",
        cwd=folder,
    )
    assert ran.returncode == 0, ran.stderr
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    by = {
        "strength": lambda each: abs(each["strength"]["d"]),
        "attention": lambda each: each["attention"]["mean"],
        "direct": lambda each: each["direct"]["mean"],
    }
    first = {name: max(scores, key=rank) for name, rank in by.items()}
    return {name: (each["layer"], each["head"]) for name, each in first.items()}


def test_the_built_head_attends_behind_the_earlier_token(built: LoadedModel) -> None:
    ids = built.tokenizer(". oak elm ash fir oak elm", return_tensors="pt").input_ids
    with reading_patterns(built.model, built.layout) as patterns, torch.no_grad():
        built.model(ids, use_cache=False)
        previous, induction = (patterns.of(layer)[0, head] for layer, head in (PREVIOUS, INDUCTION))
    torch.testing.assert_close(previous[1:], torch.eye(7)[:-1], atol=1e-3, rtol=0)
    torch.testing.assert_close(induction[5:], torch.eye(7)[[2, 3]], atol=1e-3, rtol=0)


def test_screening_finds_the_built_head(built: LoadedModel, tmp_path: Path) -> None:
    assert screened(built, tmp_path) == dict.fromkeys(("strength", "attention", "direct"), INDUCTION)


def test_without_either_head_of_the_circuit_nothing_is_copied(built: LoadedModel) -> None:
    pairs = repeated(40)
    assert copied(built, pairs) == 1
    for layer in range(2):
        for head in range(4):
            accuracy = without(built, (layer, head), pairs)
            assert accuracy < 0.5 if (layer, head) in (PREVIOUS, INDUCTION) else accuracy == 1


def test_the_built_heads_are_the_strongest(built: LoadedModel) -> None:
    with ActivationExtractor(built) as extractor:
        extractor.register_hooks()
        extractor.extract_activations([context for context, _ in repeated(10)], batch_size=4)
        strength = extractor.compute_R_h()
    assert {
        max((head for head in strength if head[0] == layer), key=lambda head: strength[head]) for layer in range(2)
    } == {PREVIOUS, INDUCTION}

"""Small models with tokens for thinking, which write what a test has them write."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoTokenizer, GenerationMixin, LogitsProcessor

from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from helpers.models import CONFIGS, build

TAGS = ["<think>", "</think>"]
HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]


def tokenizer_with(*tokens: str, special: bool = False, template: str | None = None) -> Any:
    """The demo's tokenizer with further tokens. special: they are dropped from texts, as GPT-OSS' and Mistral's are."""
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(DEMO_FOLDER))
    added = [AddedToken(each, special=special, normalized=False) for each in tokens]
    tokenizer.add_tokens(added, special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def thinker(tokenizer: Any) -> LoadedModel:
    """A small Llama with a row for each token of the tokenizer."""
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokenizer)
    return LoadedModel(build(config), tokenizer, "thinker")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class _Script(LogitsProcessor):
    """Has each row write the tokens of the script whose name stands in its prompt, last; then the end token."""

    def __init__(self, tokenizer: Any, scripts: Mapping[str, Sequence[int]]) -> None:
        self.tokenizer, self.scripts = tokenizer, scripts
        self.width: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.width = self.width or input_ids.shape[1]
        forced = torch.full_like(scores, -torch.inf)
        for number, row in enumerate(input_ids.tolist()):
            prompt = self.tokenizer.decode(row[: self.width])
            name = max(self.scripts, key=prompt.rfind)
            script, at = self.scripts[name], len(row) - self.width
            forced[number, script[at] if at < len(script) else self.tokenizer.eos_token_id] = 0
        return forced


@contextmanager
def writing(tokenizer: Any, scripts: Mapping[str, str | Sequence[int]]) -> Iterator[None]:
    """In the with, every model answers a prompt with a script's name by the script, a text or token ids."""
    as_ids = {name: ids_of(tokenizer, each) if isinstance(each, str) else each for name, each in scripts.items()}
    stock = GenerationMixin._get_logits_processor

    def scripted(self: Any, *args: Any, **kwargs: Any) -> Any:
        processors = stock(self, *args, **kwargs)
        processors.append(_Script(tokenizer, as_ids))
        return processors

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GenerationMixin, "_get_logits_processor", scripted)
        yield

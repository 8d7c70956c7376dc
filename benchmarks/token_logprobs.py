"""What the log-probabilities of generated tokens cost: answers generated with and without them, side by side in one process.

    python benchmarks/token_logprobs.py [ROUNDS]

The model has the size of GPT-2 small and random weights. A line gives the medians over the rounds of the time with / the time without, of the
wall clock and of the processor, and the quartiles of the latter.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from AutomaticEval.capture import generation
from AutomaticEval.capture.answers.token_logprobs import token_logprobs
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.selection import Selection

SIZES = ((1, 24), (8, 16))
"""Prompts of a batch, and new tokens of each."""
WAYS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_p=0.9, seed=1)}
N_PROMPT = 64


def gpt2_sized() -> LoadedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    model.generation_config.eos_token_id = None
    return LoadedModel(model, AutoTokenizer.from_pretrained(DEMO_FOLDER), "random, as large as GPT-2 small")


def timed(work: Callable[[], object], **how: Any) -> tuple[float, float]:
    """Seconds of the wall clock and of the processor. how: is_wanted=False generates without log-probabilities."""
    with patch.object(generation, "token_logprobs", lambda model, **_: token_logprobs(model, **how)):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - wall, time.process_time() - processor


def measure(work: Callable[[], object], n_rounds: int) -> tuple[float, float, list[float]]:
    """Medians of with / without, of the wall clock and of the processor, and the quartiles of the latter."""
    timed(work)
    wall, processor = [], []
    for number in range(n_rounds):
        order = ({}, {"is_wanted": False})[:: 1 if number % 2 else -1]
        first, second = (timed(work, **how) for how in order)
        own, without = (first, second) if number % 2 else (second, first)
        wall.append(own[0] / without[0])
        processor.append(own[1] / without[1])
    return statistics.median(wall), statistics.median(processor), statistics.quantiles(processor, n=4)


def main() -> None:
    warnings.simplefilter("ignore")
    n_rounds, loaded = int(sys.argv[1]) if len(sys.argv) > 1 else 15, gpt2_sized()
    selection = Selection.parse(positions="scored")
    for n_prompts, n_new in SIZES:
        prompts = torch.randint(1, 50_000, (n_prompts, N_PROMPT)).tolist()
        for name, sampling in WAYS.items():
            chosen = replace(sampling, max_new_tokens=n_new)
            work = partial(generation.respond, loaded, prompts, chosen, selection)
            wall, processor, (low, _, high) = measure(work, n_rounds)
            print(f"{n_prompts} x {n_new} {name}: wall {wall:.4f}, processor {processor:.4f} ({low:.4f}..{high:.4f})")


if __name__ == "__main__":
    main()

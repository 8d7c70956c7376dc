"""Measures what capturing costs: the same work with and without capture, in turn in one process; medians of the ratios.

    python benchmarks/capture.py [--rounds 5]

A random GPT-2 of 124M parameters generates 48 tokens for 8 prompts of 64 tokens; a batch of the same shape is scored once.
Captured are the residual streams of every layer at every position, with all that a run does with them except writing to the disk.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from gauges import seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.selection import Selection

N_PROMPTS, N_TOKENS, N_NEW = 8, 64, 48


def ratio(name: str, plain: Callable[[], object], captured: Callable[[], object], rounds: int) -> None:
    plain(), captured()  # warm-up
    pairs = [(seconds(plain), seconds(captured)) for _ in range(rounds)]
    middle = statistics.median(after / before for before, after in pairs)
    print(f"{name}: captured / plain = {middle:.3f}  (plain {statistics.median(p for p, _ in pairs):.2f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    model.generation_config.eos_token_id = None  # every response has its full length
    loaded = LoadedModel(model, AutoTokenizer.from_pretrained(DEMO_FOLDER), "gpt2-shape")
    ids = torch.randint(0, 400, (N_PROMPTS, N_TOKENS))
    everything = Selection.parse()

    sampling = Sampling(max_new_tokens=N_NEW)
    generate = lambda selection: respond(loaded, ids.tolist(), sampling, selection)  # noqa: E731
    ratio("generation", lambda: generate(None), lambda: generate(everything), rounds)

    layout = loaded.layout
    taps = layout.pick(everything.sites(layout.n_layers))
    where = torch.ones_like(ids).nonzero().T

    def scored() -> None:
        with torch.no_grad(), capturing(model, taps, layout.embedding, lambda f, n: Kept(*where), N_PROMPTS) as kept:
            model(ids)
        for row in range(N_PROMPTS):
            kept.take(row, range(N_TOKENS))

    with torch.no_grad():
        ratio("scoring", lambda: model(ids), scored, rounds)


if __name__ == "__main__":
    main()

"""Compares a sweep with a loop of forwards, and head strength with bare forwards, in turn in one process.

    python benchmarks/heads.py sweep [--rounds 2]     # all 144 heads of a GPT-2 of 124M parameters, 16 prompts
    python benchmarks/heads.py strength [--rounds 5]  # R_h of all heads over texts, as a part of a bare forward's tokens a second
    python benchmarks/heads.py memory                 # peak memory of R_h with 10 times as many texts, with the demo model

The model has random weights. Prompts and texts are those of the profile `extended`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import torch
from gauges import peak_memory, seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from AutomaticEval.analysis.heads.strength import ActivationExtractor
from AutomaticEval.analysis.heads.sweep import sweep_of_answers
from AutomaticEval.analysis.heads.sweep_results import SWEPT_TOGETHER
from AutomaticEval.analysis.parts.input_batches import Batcher
from AutomaticEval.analysis.words.profiles import load_profile
from AutomaticEval.capture.texts.forward import padded
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing

N_ANSWER = 5


def sweep(loaded: LoadedModel, rounds: int) -> None:
    texts = load_profile("extended").category("anger")[:16]
    encoded = sorted((loaded.tokenizer(text)["input_ids"] for text in texts), key=len)
    pairs = [(ids[:-N_ANSWER], ids[-N_ANSWER:]) for ids in encoded]
    batch = padded([ids[:-1] for ids in encoded])
    layout = loaded.layout
    found: dict[str, torch.Tensor] = {}

    def loop() -> None:
        """One forward for each head, over all prompts."""
        rows = []
        for layer in range(layout.n_layers):
            for head in range(layout.n_heads):
                with torch.no_grad(), editing(loaded.model, [Edit.scale(f"layer_{layer}.z", 0.0, heads=[head])]):
                    mask = batch.mask.long()
                    logits = loaded.model(input_ids=batch.ids, attention_mask=mask, use_cache=False).logits
                likely = logits.log_softmax(-1)
                each = []
                for row, (prompt, answer) in enumerate(pairs):
                    own = likely[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
                    each.append(own.gather(1, torch.tensor(answer)[:, None]).double().sum())
                rows.append(torch.stack(each))
        found["loop"] = torch.stack(rows)

    def swept() -> None:
        some = [
            sweep_of_answers(loaded, pairs[start : start + SWEPT_TOGETHER])
            for start in range(0, len(pairs), SWEPT_TOGETHER)
        ]
        layers = range(layout.n_layers)
        found["sweep"] = torch.cat([torch.cat([each.layer(layer) for each in some], 1) for layer in layers])

    ratios = []
    for _ in range(rounds):
        before, after = seconds(loop), seconds(swept)
        ratios.append(before / after)
        off = float((found["loop"] - found["sweep"]).abs().max())
        print(
            f"loop {before:.1f} s, sweep {after:.1f} s: {ratios[-1]:.2f} times as fast; differ by {off:.1e}", flush=True
        )
    print(f"sweep: {statistics.median(ratios):.2f} times as fast as a loop of forwards")


def strength(loaded: LoadedModel, rounds: int) -> None:
    profile = load_profile("extended")
    texts = [text for category in profile.prompts.values() for text in category][::4]
    batches = list(Batcher(loaded).batches(texts, 8))

    def bare() -> None:
        for batch in batches:
            with torch.no_grad():
                loaded.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False, logits_to_keep=1)

    def measured() -> None:
        extractor = ActivationExtractor(loaded)
        extractor.extract_activations(texts)

    measured(), bare()
    ratios = [seconds(bare) / seconds(measured) for _ in range(rounds)]
    print(
        f"strength: {statistics.median(ratios):.3f} of a bare forward's tokens a second {[round(r, 3) for r in ratios]}"
    )


def memory(n: int) -> None:
    """Peak memory of this process after R_h over n texts."""
    texts = (f"What is {number} + {number % 7}? And is it more than {number % 13}?" for number in range(n))
    ActivationExtractor("demo").extract_activations(texts)
    print(peak_memory())


def memories() -> None:
    peaks = []
    for n in (2_000, 20_000):
        done = subprocess.run([sys.executable, __file__, "memory", "--texts", str(n)], capture_output=True, text=True)
        peaks.append(int(done.stdout) / 2**20)
        print(f"memory: {n} texts, peak {peaks[-1]:.0f} MB")
    print(f"memory: {peaks[1] / peaks[0]:.3f} of the peak for 10 times the texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "strength", "memory"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokenizer", default=str(DEMO_FOLDER))
    parser.add_argument("--texts", type=int)
    given = parser.parse_args()
    if given.what == "memory":
        return memories() if given.texts is None else memory(given.texts)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    loaded = LoadedModel(model, AutoTokenizer.from_pretrained(given.tokenizer), "gpt2-shape")
    return {"sweep": sweep, "strength": strength}[given.what](loaded, given.rounds)


if __name__ == "__main__":
    main()

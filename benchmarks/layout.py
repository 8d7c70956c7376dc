"""How long it takes to find and verify where the sites of a model are, beyond a plain forward over as many tokens.

    python benchmarks/layout.py

Random weights: Llama-3.2-3B's depth with a small width, GPT-2's own sizes, and Llama-3.2-3B's own width, for which 12 layers fit into the memory of
most machines. Also the look at all 28 layers of that width without weights. Seconds of one process, the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from gauges import seconds
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from AutomaticEval.models import find_layout as finding
from AutomaticEval.models.architecture.forward_call import few_ids
from AutomaticEval.models.architecture.identities import PROBE_LENGTH
from AutomaticEval.models.checkpoint.unloaded_model import unloaded_layout
from AutomaticEval.models.described.stand_ins import with_meta_weights

LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
NARROW = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "head_dim": 8}
CASES: dict[str, Callable[[], Any]] = {
    "28 layers, d_model 192": lambda: LlamaConfig(**LLAMA | NARROW),
    "GPT-2: 12 layers, d_model 768": GPT2Config,
    "12 layers, d_model 3072, bfloat16": lambda: LlamaConfig(
        **LLAMA | {"num_hidden_layers": 12, "vocab_size": 512}, dtype="bfloat16"
    ),
}


def median(work: Callable[[], object], repeats: int) -> float:
    """The median time of some work, after one run that does not count."""
    return statistics.median([seconds(work) for _ in range(repeats + 1)][1:])


def find_anew(model: Any) -> None:
    """The layout, as if the model were seen for the first time."""
    finding._known = weakref.WeakKeyDictionary()
    finding.find_layout(model)


def measure(name: str, model: Any, repeats: int) -> None:
    """Print what the layout of a model takes beyond a forward."""
    ids = few_ids(model, PROBE_LENGTH)
    with torch.no_grad():
        plain = median(lambda: model(input_ids=ids, use_cache=True), repeats)
    found = median(lambda: find_anew(model), repeats)
    print(f"{name}: forward {plain:.3f} s, layout {found:.3f} s, beyond the forward {found - plain:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=[*CASES], choices=[*CASES])
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {PROBE_LENGTH} tokens")
    for name in given.cases:
        measure(name, AutoModelForCausalLM.from_config(CASES[name]()).eval(), given.repeats)
    started = time.perf_counter()
    with with_meta_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype=torch.float32).eval()
    made = time.perf_counter() - started
    looked = median(lambda: find_unloaded(model), given.repeats)
    print(f"28 layers, d_model 3072, without weights: made in {made:.3f} s, layout {looked:.3f} s")


def find_unloaded(model: Any) -> None:
    """The layout of a model without weights, as if it were seen for the first time."""
    finding._known = weakref.WeakKeyDictionary()
    unloaded_layout(model)


if __name__ == "__main__":
    main()

"""Compares an extraction with other ways to get one middle layer over short sentences, in turn in one process.

    python benchmarks/corpora.py speed --texts TEXTS [--tokenizer GPT2] [--n 2000] [--rounds 5] [--ways bare,naive,lens,sae]
    python benchmarks/corpora.py memory --texts TEXTS   # peak memory with 10 and 40 times as many texts, with the demo model

`bare` runs the same batches through the model, stops after the same layer, and keeps nothing. `naive` pads eight texts at a time in their
given order, runs the whole model with output_hidden_states, and copies every layer to the CPU. `lens` is TransformerLens' run_with_cache with
names_filter and stop_at_layer over the same sorted batches, kept in a list; `sae` is SAELens' ActivationsStore, which joins texts, lets them see one another, and
cuts them every 128 tokens. `lens` and `sae` need the extra `bench`, and write nothing.
The model is a GPT-2 of 124M parameters with random weights.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gauges import peak_memory, seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from AutomaticEval.capture.texts import extraction as corpus
from AutomaticEval.capture.texts.batching import TextPieces, batches_of
from AutomaticEval.capture.texts.extraction import extract
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.forward import inputs, padded
from AutomaticEval.capture.texts.piece_forwards import TOKENS
from AutomaticEval.capture.texts.sources import Text, read_texts
from AutomaticEval.capture.texts.text_set import TextSet
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection

LAYER = 6


def sorted_batches(loaded: LoadedModel, texts: list[str]) -> list[list[list[int]]]:
    """The batches that an extraction runs."""
    pieces = TextPieces(loaded.tokenizer, Feeding(), loaded.context or 1024)
    windows = pieces.windows(enumerate(Text(text, "") for text in texts))
    every = [batch for window in windows for batch in batches_of(window, Feeding(), 1024, TOKENS["cpu"])]
    return [[place.pieces[0].ids for place in batch] for batch in every]


def lens_of(model: Any) -> Any:
    """A HookedTransformer with the same weights; None if TransformerLens 3 is not installed."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    except ImportError:
        return None
    sizes: dict[str, Any] = {"n_layers": 12, "d_model": 768, "n_ctx": 1024, "d_head": 64, "n_heads": 12, "d_mlp": 3072}
    config = HookedTransformerConfig(**sizes, d_vocab=50257, act_fn="gelu_new", normalization_type="LN", eps=1e-5)
    theirs = HookedTransformer(config)
    plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    theirs.load_and_process_state_dict(convert_gpt2_weights(model, config), **plain)
    return theirs.eval()


def sae_store(theirs: Any, tokenizer: Any, texts: list[str]) -> Any:
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    theirs.set_tokenizer(tokenizer, default_padding_side="right")
    return ActivationsStore(
        theirs,
        Dataset.from_dict({"text": texts}),
        streaming=False,
        hook_name=f"blocks.{LAYER}.hook_resid_post",
        hook_head_index=None,
        context_size=128,
        d_in=768,
        n_batches_in_buffer=2,
        total_training_tokens=10**9,
        store_batch_size_prompts=8,
        train_batch_size_tokens=1024,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )


def speed(texts: list[str], tokenizer: str, rounds: int, chosen: list[str]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    loaded = LoadedModel(model, AutoTokenizer.from_pretrained(tokenizer), "gpt2-shape")
    batches = sorted_batches(loaded, texts)
    n_tokens = sum(len(ids) for batch in batches for ids in batch)
    half = AutoModelForCausalLM.from_config(GPT2Config(n_layer=LAYER + 1)).eval().transformer
    half.ln_f = torch.nn.Identity()
    half.load_state_dict(
        {name: value for name, value in model.transformer.state_dict().items() if name in half.state_dict()}
    )
    theirs = lens_of(model) if {"lens", "sae"} & set(chosen) else None
    selection = Selection.parse("resid_post", LAYER)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            extract(loaded, TextSet("texts", texts), selection, Path(folder) / "run")

    def bare() -> None:
        for batch in batches:
            with torch.no_grad():
                half(**inputs(model, padded(batch)))

    def naive() -> None:
        kept = []
        for start in range(0, len(texts), 8):
            some = padded([loaded.tokenizer(text)["input_ids"] for text in texts[start : start + 8]])
            with torch.no_grad():
                out = model(input_ids=some.ids, attention_mask=some.mask.long(), output_hidden_states=True)
            kept.append([each.cpu() for each in out.hidden_states][LAYER + 1])

    def lens() -> None:
        kept, name = [], f"blocks.{LAYER}.hook_resid_post"
        for batch in batches:
            given = padded(batch)
            with torch.no_grad():
                _, cache = theirs.run_with_cache(
                    given.ids, names_filter=name, stop_at_layer=LAYER + 1, prepend_bos=False
                )
            kept.append(cache[name])

    def sae() -> None:
        store = sae_store(theirs, loaded.tokenizer, texts)
        kept = []
        while sum(len(each) for each in kept) * 128 < n_tokens:
            kept.append(store.get_activations(store.get_batch_tokens()))

    every: dict[str, Callable[[], None]] = {"bare": bare, "naive": naive}
    if theirs is not None:
        every |= {"lens": lens, "sae": sae}
    ways = {"ours": ours, **{name: way for name, way in every.items() if name in chosen}}
    for way in ways.values():
        way()  # warm-up
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        taken = {name: seconds(way) for name, way in ways.items()}
        for name in ways:
            found[name].append(taken[name] / taken["ours"])
        print({name: round(n_tokens / each) for name, each in taken.items()}, "tokens a second", flush=True)
    for name in [each for each in ways if each != "ours"]:
        print(
            f"ours / {name}: {statistics.median(found[name]):.3f} of its tokens a second {[round(r, 3) for r in found[name]]}"
        )


def memory(texts: list[str], n: int) -> None:
    """Peak memory of this process after an extraction of n texts. Shards are small, so that even the fewest texts fill several."""
    corpus.SHARD_BYTES = 16 * 2**20
    folder = Path(tempfile.mkdtemp())
    many = (f"{texts[number % len(texts)]} {number}" for number in range(n))
    extract(load_model("demo"), TextSet("texts", many), Selection.parse("resid_post", 1), folder / "run")
    shutil.rmtree(folder)
    print(peak_memory())


def memories(path: Path) -> None:
    peaks = []
    for n in (4_000, 40_000, 160_000):
        whole = [sys.executable, __file__, "memory", "--texts", str(path), "--only", str(n)]
        done = subprocess.run(whole, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 2**20)
        print(f"memory: {n} texts, peak {peaks[-1]:.0f} MB", flush=True)
    print(
        f"memory: {peaks[1] / peaks[0]:.3f} of the peak for 10 times the texts, {peaks[2] / peaks[0]:.3f} for 40 times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokenizer", default=str(DEMO_FOLDER))
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="bare,naive,lens,sae")
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    if given.what == "speed":
        return speed(read_texts(given.texts)[: given.n], given.tokenizer, given.rounds, given.ways.split(","))
    if given.only is None:
        return memories(given.texts)
    return memory(read_texts(given.texts), given.only)


if __name__ == "__main__":
    main()

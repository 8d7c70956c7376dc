"""Measures how far activations of trained models can be compressed, kind by kind and layer by layer, and at what speed.

    python benchmarks/compression.py [--dtype bfloat16] [--model FOLDER ...] [--folder DIR] [--rounds 3] [--json FILE]

Prompts of GSM8K with 48 generated tokens, and windows of WikiText-2, run through the demo model and stories260K; --model adds causal models.
The rows of each site are compressed by HDF5's filters in the chunks that a run has, by one thread, into memory. Ratios are bytes before / after. Speeds are
bytes before compression a second of processor time. "bound" is the most that a coder can reach which takes each number by itself: it
follows from how often each pattern of sign and exponent occurs, with the bits of the mantissa as they are. The disk's own rate, `tofile` and fsync below
--folder, is printed for comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import torch
from gauges import quiet
from store_made import MB, seconds_in, write_raw
from store_numbers import FALLBACK, REAL
from torch import Tensor

from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.cli.options import quiet_libraries
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection
from AutomaticEval.store import int8
from AutomaticEval.store.bits import bits

KINDS = ("embed", "resid_post", "attn_out", "mlp_out", "mlp_post", "z", "k", "v")
N_SEQUENCES, N_NEW, WINDOW, BATCH = 64, 48, 256, 16
CHUNK_BYTES = 512 * 2**10
BLOSC2 = hdf5plugin.Blosc2
WAYS: dict[str, dict[str, Any]] = {
    "shuffle + zstd 1 (--compression zstd)": {"shuffle": True, **hdf5plugin.Zstd(clevel=1)},
    "shuffle + zstd 5": {"shuffle": True, **hdf5plugin.Zstd(clevel=5)},
    "bitshuffle + zstd 1": {**hdf5plugin.Bitshuffle(cname="zstd", clevel=1)},
    "bitshuffle + lz4": {**hdf5plugin.Bitshuffle(cname="lz4")},
    "Blosc2, shuffle + zstd 1": {**BLOSC2("zstd", clevel=1, filters=BLOSC2.SHUFFLE)},
    "Blosc2, bitshuffle + zstd 1": {**BLOSC2("zstd", clevel=1, filters=BLOSC2.BITSHUFFLE)},
    "Blosc2, bitshuffle + zstd 5": {**BLOSC2("zstd", clevel=5, filters=BLOSC2.BITSHUFFLE)},
}
"""Name -> arguments of h5py's create_dataset. Blosc2 uses one thread unless BLOSC_NTHREADS says otherwise."""
Line = dict[str, Any]


def texts() -> Iterator[tuple[str, list[str]]]:
    """Name -> texts: questions to be answered, and running text."""
    questions, running = REAL / "data" / "gsm8k" / "test.jsonl", REAL / "data" / "wikitext2" / "test.txt"
    if not questions.exists():
        print(f"no {REAL}: made-up text")
    asked = [json.loads(line)["question"] for line in questions.read_text().splitlines()] if questions.exists() else []
    yield "prompts", asked[:N_SEQUENCES] or [FALLBACK[n : n + 200] for n in range(N_SEQUENCES)]
    yield "WikiText-2", [running.read_text() if running.exists() else FALLBACK]


def sequences(loaded: LoadedModel, given: list[str]) -> tuple[list[list[int]], int]:
    """Prompts as token ids, and how many tokens to generate after each."""
    if len(given) > 1:
        return [loaded.tokenizer(text)["input_ids"][:WINDOW] for text in given], N_NEW
    ids = loaded.tokenizer(given[0][:400_000])["input_ids"]
    return [ids[at : at + WINDOW] for at in range(0, N_SEQUENCES * WINDOW, WINDOW)], 1


def rows_of(loaded: LoadedModel, given: list[str]) -> dict[str, Tensor]:
    """Key -> [n_rows, width]: the rows of all sequences, one after the other."""
    sites = ",".join(kind for kind in KINDS if any(site.kind == kind for site in loaded.layout.widths))
    prompts, n_new = sequences(loaded, given)
    found: dict[str, list[Tensor]] = {}
    for at in range(0, len(prompts), BATCH):
        with quiet():
            responses = respond(
                loaded, prompts[at : at + BATCH], Sampling(max_new_tokens=n_new), Selection.parse(sites)
            )
        for response in responses:
            assert response.sample is not None
            for part in response.sample.parts:
                for key, rows in part.rows.activations.items():
                    found.setdefault(key, []).append(rows)
    return {key: torch.cat(parts) for key, parts in found.items()}


def bound(raw: np.ndarray, mantissa: int) -> float:
    """The most that a coder can reach which takes each number by itself. mantissa: the bits of a number that are taken as they are."""
    counts = np.bincount((raw >> mantissa).reshape(-1).astype(np.int64))
    shares = counts[counts > 0] / raw.size
    return float(8 * raw.itemsize / (mantissa - (shares * np.log2(shares)).sum()))


def compressed(raw: np.ndarray, how: dict[str, Any]) -> tuple[int, float, float]:
    """Bytes after compression, and seconds of processor time to write and to read. No chunk is kept for the reading."""
    row_bytes = raw.itemsize * raw.shape[1]
    rows = 2 ** (min(max(1, CHUNK_BYTES // row_bytes), int8.BLOCK_ROWS).bit_length() - 1)
    with h5py.File("memory", "w", driver="core", backing_store=False, rdcc_nbytes=0) as file:
        began = time.process_time()
        dataset = file.create_dataset("rows", data=raw, chunks=(min(rows, len(raw)), raw.shape[1]), **how)
        file.flush()
        wrote = time.process_time() - began
        out = np.empty_like(raw)
        began = time.process_time()
        dataset.read_direct(out)
        read = time.process_time() - began
        assert np.array_equal(out, raw)
        return dataset.id.get_storage_size(), wrote, read


def measured(raw: np.ndarray, rounds: int) -> dict[str, Line]:
    """Way -> ratio, and MB/s written and read, the best of the rounds."""
    found = {}
    for way, how in WAYS.items():
        each = [compressed(raw, how) for _ in range(rounds)]
        size, wrote, read = (min(part) for part in zip(*each, strict=True))
        found[way] = {"ratio": raw.nbytes / size, "write": raw.nbytes / MB / wrote, "read": raw.nbytes / MB / read}
    return found


def disk_rate(folder: Path) -> float:
    """MB/s of `tofile` and fsync of 1 GB, the median of three."""
    plain = np.random.default_rng(0).integers(0, 2**16, 2**29, np.uint16)
    return (
        plain.nbytes / MB / statistics.median(seconds_in(folder, lambda path: write_raw(path, plain)) for _ in range(3))
    )


def show_layers(lines: list[Line]) -> None:
    """Every site: the bound and each way's ratio."""
    print("| model | text | site | width | MB | bound | " + " | ".join(WAYS) + " |")
    print("|" + "---|" * (6 + len(WAYS)))
    for line in lines:
        ratios = " | ".join(f"{line['ways'][way]['ratio']:.2f}" for way in WAYS)
        about = f"{line['model']} | {line['text']} | {line['site']} | {line['width']} | {line['MB']:.1f}"
        print(f"| {about} | {line['bound']:.2f} | {ratios} |")


def show_ways(lines: list[Line]) -> None:
    """Every way: the ratio and the speeds over all sites, and by kind."""
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    print("\n| way | ratio: lowest, median, highest | MB/s written | read | " + " | ".join(kinds) + " |")
    print("|" + "---|" * (4 + len(kinds)))
    for way in WAYS:
        ratios = sorted(line["ways"][way]["ratio"] for line in lines)
        speeds = [statistics.median(line["ways"][way][side] for line in lines) for side in ("write", "read")]
        of_kinds = [
            f"{statistics.median(line['ways'][way]['ratio'] for line in lines if line['kind'] == k):.2f}" for k in kinds
        ]
        spread = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
        print(f"| {way} | {spread} | {speeds[0]:.0f} | {speeds[1]:.0f} | " + " | ".join(of_kinds) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--model", action="append", default=[], help="the folder of a causal model, besides the two")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_grad_enabled(False)
    mantissa = {"bfloat16": 7, "float16": 10, "float32": 23}[given.dtype]
    lines: list[Line] = []
    for folder in (DEMO_FOLDER, REAL / "models" / "stories260K", *map(Path, given.model)):
        if not folder.exists():
            print(f"no {folder}: left out")
            continue
        loaded = load_model(str(folder), options=LoadOptions(dtype=given.dtype, device="cpu"))
        loaded.model.generation_config.eos_token_id = None
        for name, text in texts():
            for key, rows in rows_of(loaded, text).items():
                raw = bits(rows)
                of = {"embeddings": "embed"}.get(key, key.partition(".")[2] or "resid_post")
                about = {
                    "model": folder.name if folder != DEMO_FOLDER else "demo",
                    "text": name,
                    "site": key,
                    "kind": of,
                }
                size = {"width": raw.shape[1], "MB": raw.nbytes / MB, "bound": bound(raw, mantissa)}
                lines.append(about | size | {"ways": measured(raw, given.rounds)})
    show_layers(lines)
    show_ways(lines)
    rate = disk_rate(given.folder)
    print(f"\ntofile and fsync of 1 GB below {given.folder}, one thread: {rate:.0f} MB/s")
    if given.json:
        given.json.write_text(json.dumps({"dtype": given.dtype, "disk MB/s": rate, "sites": lines}, indent=1))


if __name__ == "__main__":
    main()

"""Measures what compression and 8 bits do to activations of trained models, and to a made-up stream with outliers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from gauges import seconds
from store_made import MB, fresh, size_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from AutomaticEval import open_run
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store import int8 as stored
from AutomaticEval.store.contents.slabs import resized
from AutomaticEval.store.writer import RunWriter

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
N_WINDOWS, WINDOW = 256, 256
FALLBACK = "Once upon a time there was a little girl who asked what the capital of a country is called. " * 4000


def real_activations() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(model, key -> [n_rows, d_model] float32) over WikiText-2. Without that data: the demo model alone, over made-up text."""
    text = REAL / "data" / "wikitext2" / "test.txt"
    folders = {"demo": DEMO_FOLDER, "stories260K": REAL / "models" / "stories260K"}
    if not text.exists():
        print(f"no {text}: the demo model over made-up text")
    for name, folder in folders.items():
        if folder.exists():
            yield name, activations_of(folder, text.read_text() if text.exists() else FALLBACK)
        else:
            print(f"no {folder}: left out")


def activations_of(folder: Path, text: str) -> dict[str, Tensor]:
    """The outputs of the embedding and of each block, in float32, window after window. Each window is a sequence of its own."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text[:400_000])["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:N_WINDOWS]  # [batch, pos]
    with torch.no_grad():
        batches = [model(part, output_hidden_states=True).hidden_states[:-1] for part in windows.split(32)]
    layers = [torch.cat(layer).flatten(0, 1) for layer in zip(*batches, strict=True)]  # [batch * pos, d_model]
    return {"embeddings" if n == 0 else f"layer_{n - 1}": layer for n, layer in enumerate(layers)}


def compression(rounds: int, folder: Path) -> None:
    """Compression of real activations: bytes of rows / files, and MB/s of rows written (synced) and read back (page cache); medians."""
    for name, found in real_activations():
        for dtype in (torch.float32, torch.bfloat16):
            samples = windows_of({key: rows.to(dtype) for key, rows in found.items()})
            n_bytes = sum(sample.parts[0].rows.size_bytes for sample in samples)
            rows, d_model = sum(len(s.parts[0].where) for s in samples), found["embeddings"].shape[1]
            print(f"{name}, {str(dtype)[6:]}: {rows} rows x {len(found)} layers x {d_model} = {n_bytes / MB:.0f} MB")
            taken: dict[str, list[tuple[float, float, float]]] = {}
            for _ in range(rounds):
                for way in (None, "gzip", "lz4", "zstd"):
                    with fresh(folder) as there:
                        taken.setdefault(str(way), []).append(compressed(there / "run", samples, way))
            for way, each in taken.items():
                size, wrote, read = (statistics.median(part) for part in zip(*each, strict=True))
                speeds = f"write {n_bytes / MB / wrote:5.0f} MB/s   read {n_bytes / MB / read:5.0f} MB/s"
                print(f"  {way:6} ratio {n_bytes / size:5.2f}   {speeds}")


def windows_of(found: dict[str, Tensor]) -> list[Sample]:
    """One sample for each window."""
    samples = []
    for start in range(0, len(found["embeddings"]), WINDOW):
        cut = {key: rows[start : start + WINDOW].clone() for key, rows in found.items()}
        rows = Rows([1] * WINDOW, ["a"] * WINDOW, list(range(WINDOW)), cut)
        samples.append(Sample({"prompt": "", "batch_rows": 1}, [1] * WINDOW, [1], [Part(rows, range(WINDOW))]))
    return samples


def compressed(folder: Path, samples: list[Sample], way: str | None) -> tuple[float, float, float]:
    """Bytes on the disk, seconds to write, seconds to read all."""

    def write() -> None:
        with RunWriter(folder, "m", {}, compression=way) as writer:
            writer.add(samples)
            writer.finish()

    wrote = seconds(write)
    run = open_run(folder)
    return size_of(folder), wrote, seconds(lambda: [run.rows(key)[:] for key in run.keys])


def by_channel(rows: Tensor) -> Tensor:
    """Rows rounded as files hold int8: with a scale for each channel over a block of rows."""
    blocks = resized([rows.numpy()], stored.BLOCK_ROWS)
    return torch.from_numpy(np.concatenate([stored.restored(stored.quantized(b), stored.scales_of(b)) for b in blocks]))


def by_token(rows: Tensor) -> Tensor:
    scales = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (rows / scales).round() * scales


def fp8_by_token(rows: Tensor) -> Tensor:
    scales = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 448  # the largest e4m3
    return (rows / scales).to(torch.float8_e4m3fn).float() * scales


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8 as stored": by_channel,
    "int8, a scale a token": by_token,
    "fp8-e4m3, a scale a token": fp8_by_token,
    "bfloat16": lambda rows: rows.bfloat16().float(),
    "float16": lambda rows: rows.half().float(),
}


def made_up_stream() -> Tensor:
    """A residual stream [4096, 1024] like that of large models: a few channels and tokens are far larger than the rest."""
    generator = torch.Generator().manual_seed(0)
    n_rows, d_model, rank = 4096, 1024, 32
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    heavy = normal(n_rows, d_model) / (normal(4, n_rows, d_model).square().mean(0)).sqrt()  # Student t, 4 degrees
    rows = heavy + normal(n_rows, rank) @ normal(rank, d_model) / rank**0.5
    rows *= (0.5 * normal(d_model)).exp()
    rows[:, [100, 400, 700]] *= 60
    rows[::200, 400] = 2000
    return rows


def errors(rows: Tensor, way: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Relative L2 error in percent: over all dimensions, and over those that are no outliers."""
    rms = rows.square().mean(0).sqrt()
    usual = rms <= 6 * rms.median()
    wrong = way(rows) - rows
    return tuple(float(100 * wrong[:, dims].norm() / rows[:, dims].norm()) for dims in (slice(None), usual))


def eight_bits(rounds: int, folder: Path) -> None:
    """Relative L2 error in %, over all dimensions / without those whose rms exceeds 6 times the median; median over the layers."""
    del rounds, folder
    streams = {"made up, with outliers": [made_up_stream()]}
    streams |= {name: list(found.values()) for name, found in real_activations()}
    print(f"{'':26} " + " ".join(f"{name:>24}" for name in streams))
    for name, way in WAYS.items():
        cells = []
        for layers in streams.values():
            both = zip(*(errors(rows, way) for rows in layers), strict=True)
            cells.append(" / ".join(f"{statistics.median(each):.3f}" for each in both))
        print(f"{name:26} " + " ".join(f"{cell:>24}" for cell in cells))

"""Made-up samples, clocks and small tables for the benchmarks of the store.

A ratio compares two sides of one round, which run one after the other in the same process, so that a busy machine slows both.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gauges import seconds

from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.bits import bits
from AutomaticEval.store.writer import SHARD_BYTES, RunWriter

MB = 1e6
VOCABULARY = 5000
BATCH = 8
TEXT = "what is the river called that runs through a city where some people still speak of their old king"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Workload:
    """A run's samples in bfloat16, with every position of every layer."""

    n_samples: int
    n_tokens: int
    """Tokens of a sample on average, prompt and response together."""

    n_layers: int
    width: int

    @property
    def keys(self) -> list[str]:
        return ["embeddings", *(f"layer_{layer}" for layer in range(self.n_layers - 1))]

    def sample(self, number: int) -> Sample:
        """One sample, whose tensors have their own memory."""
        generator = torch.Generator().manual_seed(number)
        spread = self.n_tokens // 4
        n_rows = self.n_tokens + (number * 7919 % (2 * spread + 1) - spread)
        ids = torch.randint(VOCABULARY, (n_rows + 1,), generator=generator).tolist()
        rows = Rows(
            ids[:-1],
            [f"Ġt{token}" for token in ids[:-1]],
            list(range(n_rows)),
            {key: noise(n_rows, self.width, number + layer) for layer, key in enumerate(self.keys)},
        )
        n_prompt = n_rows * 4 // 5
        return Sample(columns(number, n_prompt), ids[:n_prompt], ids[n_prompt:], [Part(rows, range(n_rows))])

    def samples(self) -> list[Sample]:
        return [self.sample(number) for number in range(self.n_samples)]


FULL = Workload(n_samples=100, n_tokens=210, n_layers=25, width=896)
SMALL = Workload(n_samples=3000, n_tokens=11, n_layers=13, width=768)


@cache
def _normal() -> torch.Tensor:
    return torch.randn(2**23, generator=torch.Generator().manual_seed(0)).bfloat16()


def noise(n_rows: int, width: int, seed: int) -> torch.Tensor:
    """[n_rows, width], bfloat16, with its own memory. No two seeds below a million give the same page."""
    start = seed * 7919 % (2**23 - n_rows * width)
    return _normal()[start : start + n_rows * width].clone().view(n_rows, width)


def columns(number: int, n_prompt: int) -> dict[str, Any]:
    """The columns of a benchmark run's sample before it is scored."""
    return {
        "prompt": " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(64)),  # about 300 characters
        "response": " ".join(WORDS[(number * 3 + i) % len(WORDS)] for i in range(4)),
        "timestamp": "2026-09-15T14:30:22+00:00",
        "n_prompt_tokens": n_prompt,
        "batch_rows": BATCH,
        "batch_columns": n_prompt,
        "task": f"mmlu_{number * 57 // 100_000}",
        "doc_id": number // 4,
        "choice": number % 4,
        "repeat": 0,
        "n_truncated": 0,
    }


def scored(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the columns that the evaluation adds."""
    right = record["doc_id"] % 3 == 0
    return {
        **record,
        "logprob": -1.5 - record["choice"],
        "is_greedy": record["choice"] == 0,
        "correct": right,
        "target": 2,
        "prediction": 2 if right else 1,
        "metrics": {"none": {"acc": float(right), "acc_norm": float(right)}},
        "prompt_hash": f"{record['doc_id']:064x}",
    }


def rows_bytes(samples: Sequence[Sample]) -> int:
    return sum(part.rows.size_bytes for sample in samples for part in sample.parts)


def write(folder: Path, samples: Sequence[Sample], **options: Any) -> None:
    """Write a run as an evaluation does: batch after batch, then `run.h5`."""
    with RunWriter(folder, "m", {"dtype": "bfloat16"}, **options) as writer:
        for start in range(0, len(samples), BATCH):
            writer.add(samples[start : start + BATCH])
        writer.finish()


def bits_of(samples: Sequence[Sample]) -> np.ndarray:
    """The numbers that a run of the samples holds, key after key, in one array."""
    rows = [part.rows for sample in samples for part in sample.parts]
    return np.concatenate([bits(each.activations[key]).reshape(-1) for key in rows[0].activations for each in rows])


def write_raw(folder: Path, plain: np.ndarray, n_threads: int = 1) -> None:
    """Write with `tofile` and fsync, in files as large as a shard."""
    folder.mkdir()
    step = SHARD_BYTES // plain.itemsize

    def one(start: int) -> None:
        with (folder / f"{start}.bin").open("wb") as file:
            plain[start : start + step].tofile(file)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(one, range(0, len(plain), step)))


def sync_all(folder: Path) -> None:
    """fsync every file of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def fresh(parent: Path) -> Iterator[Path]:
    """A new folder, deleted afterwards. The deletion is synced, so that the next measurement does not pay for it."""
    made = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made)
        os.sync()


def seconds_in(parent: Path, work: Callable[[Path], object]) -> float:
    """Seconds of work in a new folder."""
    with fresh(parent) as folder:
        np.ones(2**31, np.uint8)  # a virtual machine may have given free pages back: fetch them before the clock starts
        return seconds(lambda: work(folder / "run"))


Clock = Callable[[], float]


def alternating(ours: Clock, theirs: Clock, rounds: int) -> list[tuple[float, float]]:
    """(ours, theirs) in seconds, round by round, after one warm-up. The two sides take turns in being first."""
    ours(), theirs()
    found = []
    for number in range(rounds):
        if number % 2:
            b, a = theirs(), ours()
        else:
            a, b = ours(), theirs()
        found.append((a, b))
    return found


def show_ratio(name: str, n_bytes: int, pairs: Sequence[tuple[float, float]], base: str) -> None:
    """Print our throughput / theirs: the median, and the worst and best round."""
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    best = min(theirs for _, theirs in pairs) / min(ours for ours, _ in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"{name:34} {statistics.median(ratios):5.2f} of {base} ({ratios[0]:.2f}..{ratios[-1]:.2f}; best of each "
        f"{best:.2f})   {n_bytes / MB / ours:5.0f} and {n_bytes / MB / theirs:5.0f} MB/s"
    )


def show(name: str, value: float, unit: str, spread: Sequence[float] = ()) -> None:
    around = f" ({min(spread):.3g}..{max(spread):.3g})" if spread else ""
    print(f"{name:34} {value:.4g} {unit}{around}")


def times(work: Callable[[], object], rounds: int) -> list[float]:
    work()  # warm-up
    return [seconds(work) for _ in range(rounds)]

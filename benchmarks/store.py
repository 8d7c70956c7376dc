"""Measures what the files cost: writing, reading, opening, memory, and other formats; as ratios, side by side in one process.

    python benchmarks/store.py [--rounds 5] [--folder DIR] [part ...]

Parts: writing, reading, checking, verifying, opening, many_shards, others, memory, compression, eight_bits; without a name, all of them run. Everything is
written below --folder, which should be on the disk to be measured, and is removed again. Needs 4 GB of memory and of disk.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from gauges import peak_memory, seconds
from store_checks import checking, verifying
from store_made import (
    BATCH,
    FULL,
    MB,
    SMALL,
    Workload,
    alternating,
    bits_of,
    columns,
    fresh,
    rows_bytes,
    scored,
    seconds_in,
    show,
    show_ratio,
    size_of,
    times,
    write,
    write_raw,
)
from store_numbers import compression, eight_bits
from store_others import others
from torch.utils.data import DataLoader

from AutomaticEval import open_run
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.bits import bits
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.hdf5.write import write_file
from AutomaticEval.store.writer import SHARD_BYTES, RunWriter
from AutomaticEval.store.writing import small_shards

MEMORY = Workload(n_samples=320, n_tokens=110, n_layers=13, width=768)  # 700 MB
MEMORY_SMALL = Workload(n_samples=3200, n_tokens=11, n_layers=13, width=768)
MEMORY_SHARD_BYTES = 64 * 2**20


def writing(rounds: int, folder: Path) -> None:
    """Writing a run, compared with `ndarray.tofile` and fsync of the same bytes, in files as large as a shard. Targets: 0.85, size 1.02.

    Gathered before: `tofile` writes one array that holds all numbers. Tensor by tensor: it writes the tensors that a capture gives, as ours does.
    """
    for name, workload in (("full", FULL), ("small", SMALL)):
        samples = workload.samples()
        whole_run(name, samples, rounds, folder)
        sealing(name, samples, rounds, folder)


def whole_run(name: str, samples: list[Sample], rounds: int, folder: Path) -> None:
    """Time from the first sample that is added until `run.h5` is on the disk."""
    n_bytes, plain = rows_bytes(samples), bits_of(samples)
    ways: dict[str, Callable[[Path], None]] = {
        "tofile, gathered before": lambda path: write_raw(path, plain),
        "tofile, tensor by tensor": lambda path: write_tensors(path, samples),
    }
    for way, raw in ways.items():
        pairs = alternating(
            lambda: seconds_in(folder, lambda run: write(run, samples)),
            lambda: seconds_in(folder, raw),  # noqa: B023
            rounds,
        )
        show_ratio(f"{name}: a run, with run.h5", n_bytes, pairs, way)
    with fresh(folder) as run:
        write(run, samples)
        show(f"{name}: files / rows", size_of(run) / n_bytes, "")


def sealing(name: str, samples: list[Sample], rounds: int, folder: Path) -> None:
    """Time to write one shard of the samples."""
    some, n_bytes = [], 0
    for sample in samples:
        some.append(sample)
        n_bytes += rows_bytes([sample])
        if n_bytes >= SHARD_BYTES:
            break
    plain = bits_of(some)
    pairs = alternating(
        lambda: seconds_in(folder, lambda path: write_file(path, of_samples(some, "m", {}))),
        lambda: seconds_in(folder, lambda path: write_raw(path, plain)),
        rounds,
    )
    show_ratio(f"{name}: one shard", n_bytes, pairs, "tofile")
    gathering = times(lambda: of_samples(some, "m", {}), rounds)
    show(f"{name}: of_samples alone", statistics.median(gathering) * 1e3, "ms", [t * 1e3 for t in gathering])


def write_tensors(folder: Path, samples: list[Sample]) -> None:
    """Write the tensors as a capture gives them, one file for each shard."""
    folder.mkdir()
    waiting = list(samples)
    while waiting:
        with (folder / f"{len(waiting)}.bin").open("wb") as file:
            while waiting and file.tell() < SHARD_BYTES:
                for tensor in waiting.pop().parts[0].rows.activations.values():
                    bits(tensor).tofile(file)
            os.fsync(file.fileno())


def reading(rounds: int, folder: Path) -> None:
    """Reading from the page cache. Targets: a layer 0.8 of `numpy.fromfile`, its batches 0.7, a sample's layer 1 ms."""
    for name, workload in (("full", FULL), ("small", SMALL)):
        with fresh(folder) as there:
            write(there / "run", workload.samples())
            run = open_run(there / "run")
            key = workload.keys[workload.n_layers // 2]
            rows = run.rows(key)
            plain = there / "layer.bin"
            bits(rows[:]).tofile(plain)
            n_bytes = plain.stat().st_size
            read_raw = lambda: seconds(lambda: np.fromfile(plain, np.uint16))  # noqa: E731, B023
            ways: dict[str, Callable[[], object]] = {
                "a layer": lambda: run.rows(key)[:],  # noqa: B023
                "a layer, 4096 rows a slice": lambda: [rows[a : a + 4096] for a in range(0, len(rows), 4096)],  # noqa: B023
                "batches of 4096, shuffled": lambda: [len(batch) for batch in run.batches(key, 4096)],  # noqa: B023
                "batches of 4096, in order": lambda: [len(batch) for batch in run.batches(key, 4096, shuffle=False)],  # noqa: B023
            }
            for way, work in ways.items():
                pairs = alternating(lambda: seconds(work), read_raw, 4 * rounds)  # noqa: B023
                show_ratio(f"{name}: {way}", n_bytes, pairs, "fromfile")
            draw = random.Random(0)
            picks = [(draw.randrange(len(run)), draw.choice(run.keys)) for _ in range(500)]
            singles = sorted(seconds(lambda: run.read(*pick)) * 1e3 for pick in picks)  # noqa: B023
            show(f"{name}: a sample's layer", statistics.median(singles), "ms", singles[5:-5])
            last = times(lambda: run.activations(key), rounds)  # noqa: B023
            show(f"{name}: last row of each sample", statistics.median(last) * 1e3, "ms", [t * 1e3 for t in last])
            for n_workers in (0, 2):
                loader = DataLoader(run.dataset(key), batch_size=256, shuffle=True, num_workers=n_workers)
                speeds = [len(rows) / taken for taken in times(lambda: [len(batch) for batch in loader], rounds)]  # noqa: B023
                show(f"{name}: shuffled, {n_workers} workers", statistics.median(speeds), "rows/s", speeds)


def opening(rounds: int, folder: Path) -> None:
    """Opening a run of 200,000 samples of 60 tokens; of each sample 4 rows, 16 wide, are kept. Targets: the table 3 s, all else 1 s."""
    with fresh(folder) as there:
        n_samples = 200_000
        taken = seconds(lambda: write_many(there / "run", n_samples))
        show("write 200,000 samples", taken, "s")
        show("run.h5", (there / "run" / "run.h5").stat().st_size / MB, "MB")
        works: dict[str, Callable[[], object]] = {
            "open_run": lambda: open_run(there / "run"),
            "open_run, table": lambda: open_run(there / "run").table(),
            "open_run, where(correct=True)": lambda: open_run(there / "run").where(correct=True),
            "open_run, [50_000]": lambda: open_run(there / "run")[50_000],
            "open_run, activations (last)": lambda: open_run(there / "run").activations("layer_0"),
        }
        for name, work in works.items():
            spread = times(work, rounds)
            show(name, statistics.median(spread), "s", spread)
        run = open_run(there / "run")
        again = times(lambda: run[random.randrange(n_samples)], 100)
        show("run[i] again", statistics.median(again) * 1e3, "ms", [t * 1e3 for t in again])
        read = times(lambda: run.read(random.randrange(n_samples), "layer_0"), 500)
        show("run.read(i, key)", statistics.median(read) * 1e3, "ms", [t * 1e3 for t in read])


def many_shards(rounds: int, folder: Path) -> None:
    """Reading one row of each sample of a run in 2,000 shards of 13 sites, opening included. Target: 2 s."""
    with fresh(folder) as there:
        n_shards, n_tokens = 2000, 20
        with (
            patch.object(small_shards, "SMALL", 0),
            RunWriter(there / "run", "m", {}, shard_bytes=1) as made,
        ):  # no shards are merged
            for number in range(n_shards):
                ids = [number * n_tokens % 5000 + i for i in range(n_tokens + 1)]
                sites = {f"layer_{layer}": torch.randn(n_tokens, 64).bfloat16() for layer in range(13)}
                rows = Rows(ids[:-1], [f"t{each}" for each in ids[:-1]], range(n_tokens), sites)
                made.add([Sample(columns(number, n_tokens), ids[:-1], ids[-1:], [Part(rows, range(n_tokens))])])
            made.finish()
        assert len(open_run(there / "run").shards) == n_shards
        spread = times(lambda: open_run(there / "run").activations("layer_3"), rounds)
        show("open_run, activations (last)", statistics.median(spread), "s", spread)
        run = open_run(there / "run")
        run.activations("layer_3")
        again = times(lambda: run.activations("layer_3"), rounds)
        show("the same again", statistics.median(again), "s", again)


def write_many(folder: Path, n_samples: int) -> None:
    draw = np.random.default_rng(0)
    n_tokens, n_kept, width = 60, 4, 16
    with RunWriter(folder, "m", {"dtype": "bfloat16"}, shard_bytes=2**24) as writer:
        for start in range(0, n_samples, BATCH):
            batch = []
            for number in range(start, start + BATCH):
                ids = draw.integers(0, 5000, n_tokens + 1).tolist()
                where = range(n_tokens - n_kept, n_tokens)
                tensor = torch.randn(n_kept, width).bfloat16()
                rows = Rows([ids[i] for i in where], [f"Ġt{ids[i]}" for i in where], list(where), {"layer_0": tensor})
                batch.append(Sample(columns(number, n_tokens), ids[:-1], ids[-1:], [Part(rows, range(n_kept))]))
            writer.add(batch)
        writer.finish(Listed.of([scored(record) for record in writer.records()]))


def memory(rounds: int, folder: Path) -> None:
    """Peak memory of a process that makes samples batch by batch and writes them. Target: 1.05 with 10 times the samples."""
    del rounds
    for name, workload in (("110 rows a sample", MEMORY), ("11 rows a sample", MEMORY_SMALL)):
        peaks = []
        for times_as_many in (0, 1, 10):
            with fresh(folder) as there:
                n_samples = workload.n_samples * times_as_many
                sizes = (str(size) for size in (n_samples, workload.n_tokens, workload.n_layers, workload.width))
                child = [sys.executable, __file__, "--folder", str(there), "--child", *sizes]
                peaks.append(int(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
        empty, one, ten = (peak / MB for peak in peaks)
        print(
            f"{name:34} {one:.0f} MB, 10 times as many: {ten:.0f} MB = {ten / one:.3f} (imports alone: {empty:.0f} MB)"
        )


def streamed(folder: Path, workload: Workload) -> int:
    """Write samples; each batch is made just before it is written. Returns the peak memory of this process, in bytes."""
    torch.set_num_threads(1)
    if workload.n_samples:
        with RunWriter(folder / "run", "m", {}, shard_bytes=MEMORY_SHARD_BYTES) as writer:
            for start in range(0, workload.n_samples, BATCH):
                writer.add([workload.sample(number) for number in range(start, start + BATCH)])
            writer.finish()
    return peak_memory()


PARTS: dict[str, Callable[[int, Path], None]] = {
    part.__name__: part
    for part in (writing, reading, checking, verifying, opening, many_shards, others, memory, compression, eight_bits)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="part", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", type=int, nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(streamed(given.folder, Workload(*given.child)))
        return
    made = Path(tempfile.mkdtemp(prefix="store-", dir=given.folder))
    try:
        for name in given.parts or PARTS:
            print(f"\n{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}")
            PARTS[name](given.rounds, made)
    finally:
        shutil.rmtree(made)


if __name__ == "__main__":
    main()

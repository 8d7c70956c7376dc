"""Compares the formats in which people store samples today with that of this project."""

from __future__ import annotations

import pickle
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import safetensors.torch
import torch
from gauges import seconds
from safetensors import safe_open
from store_made import BATCH, MB, Workload, fresh, rows_bytes, size_of, sync_all, write

from AutomaticEval import open_run
from AutomaticEval.samples import Sample
from AutomaticEval.store.bits import bits, from_bits

SAME = Workload(n_samples=96, n_tokens=110, n_layers=13, width=768)  # 210 MB
Reader = Callable[[int, str], torch.Tensor]
"""(sample, key) -> [n_rows, width]"""

FileReader = Callable[[Path, int, str], torch.Tensor]
"""(folder, sample, key) -> [n_rows, width]"""


def tensors_of(sample: Sample) -> dict[str, torch.Tensor]:
    return dict(sample.parts[0].rows.activations)


def write_pickles(folder: Path, samples: Sequence[Sample]) -> None:
    for number, sample in enumerate(samples):
        with (folder / f"{number}.pkl").open("wb") as file:
            pickle.dump({**sample.fields, "activations": tensors_of(sample)}, file)


def read_pickle(folder: Path, number: int, key: str) -> torch.Tensor:
    with (folder / f"{number}.pkl").open("rb") as file:
        return pickle.load(file)["activations"][key]


def write_groups(folder: Path, samples: Sequence[Sample]) -> None:
    """The bits as integers, because h5py has no bfloat16."""
    with h5py.File(folder / "all.h5", "w") as file:
        for number, sample in enumerate(samples):
            group = file.create_group(str(number))
            group.attrs.update(sample.fields)
            for key, tensor in tensors_of(sample).items():
                group.create_dataset(key, data=bits(tensor))


def read_group(folder: Path, number: int, key: str) -> torch.Tensor:
    with h5py.File(folder / "all.h5") as file:
        return from_bits(file[f"{number}/{key}"][:], torch.bfloat16)


def batch_of(samples: Sequence[Sample], start: int) -> dict[str, torch.Tensor]:
    numbered = enumerate(samples[start : start + BATCH], start)
    return {f"{number}.{key}": tensor for number, sample in numbered for key, tensor in tensors_of(sample).items()}


def write_torch(folder: Path, samples: Sequence[Sample]) -> None:
    for start in range(0, len(samples), BATCH):
        torch.save(batch_of(samples, start), folder / f"{start}.pt")


def read_torch(folder: Path, number: int, key: str) -> torch.Tensor:
    return torch.load(folder / f"{number // BATCH * BATCH}.pt")[f"{number}.{key}"]


def write_safetensors(folder: Path, samples: Sequence[Sample]) -> None:
    for start in range(0, len(samples), BATCH):
        safetensors.torch.save_file(batch_of(samples, start), folder / f"{start}.safetensors")


def read_safetensors(folder: Path, number: int, key: str) -> torch.Tensor:
    with safe_open(folder / f"{number // BATCH * BATCH}.safetensors", "pt") as file:
        return file.get_tensor(f"{number}.{key}")


def whole_by_file(folder: Path, key: str, n_samples: int, read: FileReader) -> torch.Tensor:
    """Read one layer of all samples, each file once, as a careful user of that format would."""
    if read is read_group:
        with h5py.File(folder / "all.h5") as file:
            return from_bits(
                np.concatenate([file[f"{number}/{key}"][:] for number in range(n_samples)]), torch.bfloat16
            )
    if read is read_pickle:
        return torch.cat([read(folder, number, key) for number in range(n_samples)])
    found = []
    for start in range(0, n_samples, BATCH):
        names = [f"{number}.{key}" for number in range(start, min(start + BATCH, n_samples))]
        if read is read_torch:
            whole = torch.load(folder / f"{start}.pt")
            found += [whole[name] for name in names]
        else:
            with safe_open(folder / f"{start}.safetensors", "pt") as file:
                found += [file.get_tensor(name) for name in names]
    return torch.cat(found)


WAYS = {
    "a pickle a sample": (write_pickles, read_pickle),
    "h5py, a group a sample": (write_groups, read_group),
    "torch.save a batch": (write_torch, read_torch),
    "safetensors a batch": (write_safetensors, read_safetensors),
}


def others(rounds: int, folder: Path) -> None:
    """Other formats with 210 MB: write and sync, size, a random sample's layer, and one layer of all samples, both from the page cache; medians."""
    samples = SAME.samples()
    n_bytes, key = rows_bytes(samples), SAME.keys[6]
    layer_bytes = n_bytes / SAME.n_layers
    names = [*WAYS, "AutomaticEval"]
    taken: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            with fresh(folder) as there:
                measured = measure(there, samples, key, name)
            if number:  # the first is a warm-up
                taken[name].append(measured)
    print(f"{'':24} {'write s':>18} {'size':>6} {'sample x layer ms':>18} {'layer MB/s':>11}")
    for name in names:
        wrote, size, single, whole = (statistics.median(each) for each in zip(*taken[name], strict=True))
        spread = f"({min(t[0] for t in taken[name]):.2f}..{max(t[0] for t in taken[name]):.2f})"
        print(
            f"{name:24} {wrote:5.2f} {spread:>12} {size / n_bytes:6.3f} {single:18.3f} {layer_bytes / MB / whole:11.0f}"
        )


def measure(there: Path, samples: Sequence[Sample], key: str, name: str) -> tuple[float, float, float, float]:
    """Seconds to write, size in bytes, milliseconds to read one sample's layer, seconds to read a layer of all samples."""
    np.ones(2**29, np.uint8)  # fetch free pages first, as in seconds_in
    if name in WAYS:
        store, read = WAYS[name]
        wrote = seconds(lambda: (store(there, samples), sync_all(there)))
        one: Reader = lambda number, key: read(there, number, key)  # noqa: E731
        all_of = lambda: whole_by_file(there, key, len(samples), read)  # noqa: E731
    else:
        wrote = seconds(lambda: write(there / "run", samples))
        run = open_run(there / "run")
        one, all_of = run.read, lambda: run.rows(key)[:]
    expected = torch.cat([sample.parts[0].rows.activations[key] for sample in samples])
    assert torch.equal(all_of().view(torch.int16), expected.view(torch.int16))
    draw = random.Random(0)
    single = [seconds(lambda: one(draw.randrange(len(samples)), key)) * 1e3 for _ in range(20)]
    return wrote, size_of(there), statistics.median(single), seconds(all_of)

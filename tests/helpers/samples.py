"""Samples made of random numbers, runs that hold them, and comparisons of what is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.hdf5 import checksums
from AutomaticEval.store.writer import RunWriter

SETTINGS = {"dtype": "float32", "attention": "sdpa"}


def make_sample(
    dtype: torch.dtype = torch.float32,
    n_prompt: int = 4,
    n_response: int = 3,
    width: int = 8,
    seed: int = 0,
    **fields: Any,
) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 300, (n_prompt + n_response,), generator=generator).tolist()
    n_rows = n_prompt + n_response - 1
    rows = Rows(
        ids[:-1],
        [f"t{token}" for token in ids[:-1]],
        list(range(n_rows)),
        {key: torch.randn(n_rows, width, generator=generator).to(dtype) for key in ("embeddings", "layer_0")},
    )
    columns = {
        "prompt": "What?",
        "response": "That.",
        "timestamp": "2026-09-15T14:30:22+00:00",
        "n_prompt_tokens": n_prompt,
        "batch_rows": 1,
        "batch_columns": n_prompt,
        **fields,
    }
    return Sample(columns, ids[:n_prompt], ids[n_prompt:], [Part(rows, range(n_rows))])


def sample_of(number: int, sites: dict[str, Tensor], **fields: Any) -> Sample:
    """A sample whose rows are given."""
    n_rows = len(next(iter(sites.values())))
    ids = [1 + (number * 31 + i * 7) % 300 for i in range(n_rows + 1)]
    part = Part(Rows(ids[:-1], [f"t{each}" for each in ids[:-1]], range(n_rows), sites), range(n_rows))
    columns = {"prompt": f"What is {number}?", "task": "t", "doc_id": number, "choice": 0, "repeat": 0, **fields}
    return Sample(columns, ids[:-1], ids[-1:], [part])


def write_run(folder: Path, n_samples: int, shard_bytes: int) -> list[Sample]:
    samples = [make_sample(torch.bfloat16, n_prompt=3 + i % 4, seed=i, task="t", doc_id=i) for i in range(n_samples)]
    with RunWriter(folder, "m", SETTINGS, shard_bytes=shard_bytes) as made:
        for sample in samples:
            made.add([sample])
        made.finish(
            Listed.of([{**record, "correct": record["doc_id"] % 2 == 0} for record in reversed(made.records())])
        )
    return samples


def with_right_checksums(file: h5py.File, *names: str) -> None:
    """Give changed datasets (of one block each) the checksum of their new bytes, as an attacker or a wrong writer would."""
    for name in names:
        file[name].attrs[checksums.NAME] = checksums.of_numbers([file[name][()]])


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; tensors are compared bit for bit."""
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
        return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def assert_same_data(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one) == set(other)
    for key in one:
        assert same(one[key], other[key]), key


def assert_same_rows(actual: Sample, expected: Sample) -> None:
    """Rows are equal within rounding: 2e-5 of the row's largest number, or of 1 where all are smaller."""
    assert actual.generated_ids == expected.generated_ids
    one, other = (each.activation_data("m", {}) for each in (actual, expected))
    assert one["positions"].tolist() == other["positions"].tolist()
    assert one["activations"].keys() == other["activations"].keys()
    for key, rows in one["activations"].items():
        assert_near(rows, other["activations"][key])


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    off, size = (actual - expected).abs().amax(-1), expected.abs().amax(-1).clamp(min=1)
    assert bool((off <= 2e-5 * size).all()), f"off by {float((off / size).max()):.1e} of the row's largest number"

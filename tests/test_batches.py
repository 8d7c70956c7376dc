"""`run.batches`: each row once an epoch, in an order that seed and epoch decide, aligned over sites, resumed at any step."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.samples import SETTINGS, make_sample, sample_of
from torch import Tensor

from AutomaticEval import open_run
from AutomaticEval.errors import DamagedFile, StoreError
from AutomaticEval.store.row_array import RowArray
from AutomaticEval.store.run import Run
from AutomaticEval.store.writer import RunWriter
from AutomaticEval.store.writing import small_shards

N_ROWS = 1003


def counted(folder: Path) -> Run:
    """A run in many shards. Row r of layer_0 is [r, r, …], and of layer_1.mlp_out, which is wider, [-r, …]."""
    with patch.object(small_shards, "SMALL", 0), RunWriter(folder, "m", SETTINGS, shard_bytes=9000) as made:
        first = 0
        while first < N_ROWS:
            numbers = torch.arange(first, min(first + 7 + first % 5, N_ROWS), dtype=torch.float32)[:, None]
            sites = {"layer_0": numbers.repeat(1, 8), "layer_1.mlp_out": -numbers.repeat(1, 12)}
            made.add([sample_of(first, sites)])
            first += len(numbers)
        made.finish()
    run = open_run(folder)
    assert len(run.shards) > 5
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return counted(tmp_path_factory.mktemp("batches") / "run")


def order(batches: Any) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch]


def test_each_row_once_an_epoch_in_new_orders(run: Run) -> None:
    for batch_size, buffer_rows in ((64, 200), (64, 65536), (300, 128), (7, 1), (2000, 50)):
        batches = run.batches("layer_0", batch_size, seed=3, buffer_rows=buffer_rows)
        assert len(batches) == -(-N_ROWS // batch_size)
        given = list(batches)
        assert [len(batch) for batch in given[:-1]] == [batch_size] * (len(batches) - 1)
        assert all(torch.equal(batch, batch[:, :1].expand(-1, 8)) for batch in given)
        first, second = order(given), order(batches)
        assert sorted(first) == sorted(second) == list(range(N_ROWS))
        assert first != second
        assert (batches.step, batches.epoch) == (2 * len(batches), 2)
        again = run.batches("layer_0", batch_size, seed=3, buffer_rows=buffer_rows)
        assert [order(again), order(again)] == [first, second]
        assert order(run.batches("layer_0", batch_size, seed=4, buffer_rows=buffer_rows)) != first
        in_order = run.batches("layer_0", batch_size, shuffle=False, buffer_rows=buffer_rows)
        assert order(in_order) == order(in_order) == list(range(N_ROWS))


def test_batches_mix_the_whole_run(run: Run) -> None:
    """With room for all rows, every order is as likely as another; with a small buffer, a batch still comes from all over the run."""
    firsts = [order(islice(run.batches("layer_0", 10, seed=seed), 1)) for seed in range(100)]
    drawn = np.bincount(np.concatenate(firsts) * 10 // N_ROWS, minlength=10)
    assert abs(drawn - 100).max() < 5 * np.sqrt(100 * 0.9)  # 1000 draws over ten parts: five standard deviations
    for seed in range(20):
        (some,) = islice(run.batches("layer_0", 64, seed=seed, buffer_rows=128), 1)
        assert some[:, 0].std() > 0.7 * N_ROWS / np.sqrt(12)  # an even spread has N / sqrt(12)
        neighbours = (some[1:, 0] - some[:-1, 0]).abs() == 1
        assert neighbours.float().mean() < 0.2


def test_several_sites_give_the_same_tokens(run: Run) -> None:
    both = run.batches(keys=["layer_1.mlp_out", "layer_0.resid_post"], batch_size=100, seed=1, buffer_rows=250)
    seen: list[int] = []
    for batch in both:
        assert list(batch) == ["layer_1.mlp_out", "layer_0.resid_post"]
        assert batch["layer_1.mlp_out"].shape[1:] == (12,)
        assert torch.equal(batch["layer_1.mlp_out"][:, 0], -batch["layer_0.resid_post"][:, 0])
        seen += batch["layer_0.resid_post"][:, 0].int().tolist()
    assert sorted(seen) == list(range(N_ROWS))
    assert seen == order(run.batches("layer_0", 100, seed=1, buffer_rows=250))


def test_a_training_that_was_cut_goes_on_at_its_step(run: Run) -> None:
    how: dict[str, Any] = {"seed": 5, "buffer_rows": 200}
    whole = run.batches("layer_0", 64, **how)
    every = [batch for _ in range(3) for batch in whole]
    for start in (0, 1, 3, 15, 16, 17, 40, len(every) - 1):
        later = run.batches("layer_0", 64, start=start, **how)
        given = [batch for _ in range(3 - start // len(whole)) for batch in later]
        assert len(given) == len(every) - start
        assert all(map(torch.equal, given, every[start:]))
    cut = run.batches("layer_0", 64, **how)
    before = []
    for batch in cut:
        before.append(batch)
        if len(before) == 5:
            break
    assert cut.step == 5
    assert all(map(torch.equal, [*before, *run.batches("layer_0", 64, start=cut.step, **how)], every[: len(whole)]))
    assert all(map(torch.equal, [*before, *cut], every[: len(whole)]))  # the same object goes on, too


def test_only_what_a_step_needs_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows than the buffer at once; nothing of the steps before; and what is read is checked."""
    run = counted(tmp_path / "run")
    read: list[int] = []
    stock = RowArray.read_into

    def counting(self: RowArray, at: Any, out: Tensor) -> None:
        read.append(len(at))
        stock(self, at, out)

    monkeypatch.setattr(RowArray, "read_into", counting)
    assert len(order(run.batches("layer_0", 10, buffer_rows=128))) == N_ROWS
    assert max(read) <= 128
    assert sum(read) == N_ROWS
    read.clear()
    next(iter(run.batches("layer_0", 10, buffer_rows=128, start=95)))
    assert sum(read) <= 128
    first = run.shards[0].path
    raw = bytearray(first.read_bytes())
    at = run.shards[0].extents["layer_0"].offset
    assert at is not None
    raw[at + 50] ^= 1
    run = open_run(tmp_path / "run")
    first.write_bytes(raw)
    with pytest.raises(DamagedFile, match="layer_0"):
        list(run.batches("layer_0", 10, buffer_rows=128))
    late = run.batches("layer_0", 10, shuffle=False, buffer_rows=128, start=95)
    assert order(late) == list(range(950, N_ROWS))  # the shard that is broken is not touched


def test_some_samples_and_a_device(run: Run) -> None:
    some = run.where(doc_id=lambda number: number % 3 == 0)
    wanted = some.rows("layer_0")[:][:, 0].int().tolist()
    assert 0 < len(wanted) < N_ROWS
    assert sorted(order(some.batches("layer_0", 32, buffer_rows=100))) == sorted(wanted)
    assert list(run.where(doc_id=-1).batches("layer_0", 32)) == []
    (batch, *_) = run.batches("layer_0", 32, device="meta")
    assert (batch.device.type, batch.shape) == ("meta", (32, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrow_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    """bfloat16 stays what it is; 8 bits become float32, as everywhere."""
    settings = {**SETTINGS, "store_dtype": "int8"} if dtype == torch.int8 else SETTINGS
    with RunWriter(tmp_path / "run", "m", settings) as made:
        for seed in range(30):
            made.add([make_sample(torch.bfloat16, seed=seed)])
        made.finish()
    narrow = open_run(tmp_path / "run")
    rows = narrow.rows("layer_0")[:]
    given = torch.cat(list(narrow.batches("layer_0", 32, buffer_rows=100)))
    assert given.dtype == rows.dtype == (torch.float32 if dtype == torch.int8 else dtype)
    assert sorted(map(tuple, given.tolist())) == sorted(map(tuple, rows.tolist()))


def test_the_existing_stream_has_the_same_rows(run: Run) -> None:
    assert sorted(order([torch.stack(list(run.dataset("layer_0", shuffle=True, buffer_rows=100)))])) == list(
        range(N_ROWS)
    )


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, r"which site\? Give one key, run\.batches\('layer_1\.mlp_out', 4096\), or several"),
        ({"key": "layer_0", "keys": ["layer_0"]}, "which site"),
        ({"keys": "layer_0"}, "which site"),
        ({"keys": []}, "which site"),
        ({"key": "layer_9"}, "holds no 'layer_9'"),
        ({"key": "layer_0", "batch_size": 0}, "batches of 0 rows"),
        ({"key": "layer_0", "buffer_rows": 0}, "buffer_rows is 0"),
        ({"key": "layer_0", "start": -1}, "start is -1; it is the number of batches"),
        ({"key": "layer_0", "device": "gpu"}, "no device 'gpu'; write cpu, cuda"),
    ],
)
def test_what_makes_no_sense_is_refused(how: dict[str, Any], says: str, run: Run) -> None:
    with pytest.raises(StoreError, match=says):
        run.batches(**how)

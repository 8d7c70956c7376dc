"""Shards that several threads write, and two of them at a time: the same bytes as from one thread, whole or not there, in bounded memory."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from functools import partial
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import pytest
import torch
import xxhash
from helpers.forked import Forked
from helpers.samples import SETTINGS, make_sample, same, sample_of

from AutomaticEval import open_run
from AutomaticEval.errors import CaptureError, DamagedFile, DiskFull, PathExists, StoreError
from AutomaticEval.samples import Sample
from AutomaticEval.store.bits import bits
from AutomaticEval.store.contents.file_contents import Activation, Contents
from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.contents.slabs import gathered
from AutomaticEval.store.disk import flushing, whole_files
from AutomaticEval.store.disk import in_threads as threads
from AutomaticEval.store.disk.in_threads import in_threads
from AutomaticEval.store.hdf5 import blocks, write
from AutomaticEval.store.hdf5.checksums import ArrayHash
from AutomaticEval.store.hdf5.write import write_file
from AutomaticEval.store.hdf5.writing import activations, rows
from AutomaticEval.store.run_folder import shard_names
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.writer import RunWriter


def ragged_samples(dtype: torch.dtype, lengths: Sequence[int], widths: dict[str, int]) -> list[Sample]:
    made = torch.Generator().manual_seed(1)
    return [
        sample_of(number, {key: torch.randn(n, width, generator=made).to(dtype) for key, width in widths.items()})
        for number, n in enumerate(lengths)
    ]


class Still(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2026, 1, 1, tzinfo=tz or UTC)


WIDTHS = {"embeddings": 300, "layer_0": 48, "layer_1.z": 20_000, "logits": 7}
"""One site has rows that may be larger than a block, and one has blocks of thousands of rows."""
LENGTHS = (3, 0, 70, 1, 17, 17, 2, 64)
"""Large tensors between small ones, and one without rows."""


def one_after_the_other(path: Path, places: Sequence[rows.Place]) -> list[rows.Written]:
    """The old way: one thread writes one site after the other, all rows of it together."""
    written = []
    for place in places:
        array = np.concatenate([np.ascontiguousarray(slab) for slab in place.activation.slabs()])
        with path.open("r+b") as file:
            file.seek(place.offset)
            file.write(array.tobytes())
        hashed = ArrayHash(place.block_rows * place.row_bytes)
        hashed.add(array)
        n_wrong = 0
        if place.activation.dtype != torch.int8:
            values = torch.from_numpy(array.view(f"i{array.itemsize}")).view(place.activation.dtype)
            n_wrong = int((~values.isfinite()).sum())
        written.append(rows.Written(hashed, n_wrong))
    return written


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16", "int8"])
def test_bytes_are_those_of_the_old_way_for_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    in_8_bits = stored == "int8"
    dtype = torch.float32 if in_8_bits else getattr(torch, stored)
    samples = ragged_samples(dtype, LENGTHS, WIDTHS)
    if not in_8_bits:
        samples[2].parts[0].rows.activations["layer_0"][5, 3] = float("nan")
        samples[5].parts[0].rows.activations["layer_0"][1, :2] = float("-inf")
    monkeypatch.setattr(write, "datetime", Still)
    monkeypatch.setattr(rows, "THREAD_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))

    def written(name: str) -> bytes:
        write_file(tmp_path / name, of_samples(samples, "m", SETTINGS, in_8_bits=in_8_bits))
        return (tmp_path / name).read_bytes()

    with monkeypatch.context() as old:
        old.setattr(activations, "write_rows", one_after_the_other)
        expected = written("old.h5")
    for n_threads in (1, 2, 4):
        monkeypatch.setattr(threads, "MOST_THREADS", n_threads)
        is_same = written(f"{n_threads}.h5") == expected
        assert is_same, n_threads
    assert verify(tmp_path / "4.h5") == []
    if in_8_bits:
        return
    with h5py.File(
        tmp_path / "4.h5"
    ) as file:  # a second way: all rows joined by torch, as plain h5py and xxhash see them
        for key in WIDTHS:
            joined = bits(torch.cat([each.parts[0].rows.activations[key] for each in samples]))
            dataset, there = file[f"activations/{key}"], np.empty_like(joined)
            dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, there, mtype=dataset.id.get_type())
            np.testing.assert_array_equal(there, joined)
            assert dataset.attrs["xxh3_64"] == xxhash.xxh3_64_hexdigest(joined.tobytes())
            assert dataset.attrs["non_finite"] == (3 if key == "layer_0" else 0)


def test_large_tensors_are_written_where_they_lie_and_small_ones_are_gathered_in_a_bounded_buffer() -> None:
    noise = torch.randn(300_000, 16)
    lengths = [1, 5, 3000, 2, 100_000, 3, *[11] * 4000, 2048, 2047]
    starts = np.cumsum([0, *lengths])
    given = [noise[a:b] for a, b in itertools.pairwise(starts)]
    slabs = list(gathered(given))
    assert torch.equal(torch.cat(slabs), noise[: starts[-1]])
    there = {tensor.data_ptr() for tensor in given}
    copies = [slab for slab in slabs if slab.data_ptr() not in there]
    assert max(slab.nbytes for slab in copies) <= 2**19
    assert sum(len(slab) for slab in copies) == sum(n for n in lengths if n < 2048)
    assert {3000, 100_000, 2048} <= {len(slab) for slab in slabs if slab.data_ptr() in there}
    assert len(slabs) < 20


def test_rows_that_are_not_contiguous_are_written_as_they_are_seen(tmp_path: Path) -> None:
    wide = torch.randn(700, 96)
    samples = [sample_of(0, {"embeddings": wide[:, ::2]}), sample_of(1, {"embeddings": wide.T[:48, :5].T})]
    write_file(tmp_path / "a.h5", of_samples(samples, "m", SETTINGS))
    assert torch.equal(open_run(tmp_path / "a.h5").rows("embeddings")[:], torch.cat([wide[:, ::2], wide.T[:48, :5].T]))


def test_threads_give_results_in_order_and_work_beside_one_another() -> None:
    together = threading.Barrier(3, timeout=10)

    def work(number: int) -> int:
        together.wait()  # only three at a time get past this
        return number * number

    assert in_threads(work, range(9), 3) == [number * number for number in range(9)]
    assert in_threads(str, [], 4) == []


def test_first_failure_is_raised_and_what_was_not_begun_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise ZeroDivisionError(number)
        time.sleep(0.05)

    with pytest.raises(ZeroDivisionError, match="2"):
        in_threads(work, range(100), 3)
    assert len(begun) < 12
    assert threading.active_count() == 1 or not any(each.name == "store" for each in threading.enumerate())

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert in_threads(str, range(3), 3) == ["0", "1", "2"]  # this thread does it alone


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The system refuses to let a file of this process grow beyond n_bytes: a write ends short there, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_in_a_thread_ends_the_run_by_name_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "THREAD_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    n_written = []
    pwrite = os.pwrite

    def noted(*given: Any) -> int:
        n_written.append(pwrite(*given))
        return n_written[-1]

    monkeypatch.setattr(os, "pwrite", noted)
    sites = {f"layer_{layer}": torch.randn(2000, 200) for layer in range(5)}

    def run() -> None:
        with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
            made.add([sample_of(0, {key: tensor[:9] for key, tensor in sites.items()})])
            made.flush()
            with largest_file(5_500_001):
                made.add([sample_of(1, sites)])
                made.flush()

    with pytest.raises(DiskFull, match=r"disk is full: .*shard-00001\.h5 was not written, and nothing"):
        run()
    assert any(n % 4096 for n in n_written), "no write ended short"
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "shard-00000.h5"]
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0]
    assert not any(each.name in ("store", "sealing") for each in threading.enumerate())


def test_a_write_that_ends_short_is_gone_on_with(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file, largest_file(10_001):
        rows._write_all(file.fileno(), memoryview(bytes(10_001)), 0)
        with pytest.raises(OSError, match="File too large") as failure:
            rows._write_all(file.fileno(), memoryview(b"x" * 6000), 5000)
        assert failure.value.errno == errno.EFBIG
    assert (tmp_path / "a").read_bytes() == bytes(5000) + b"x" * 5001  # it ended short before it failed


class Flushes:
    """Takes the place of fdatasync: notes what it was called with, and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: OSError | None = None) -> None:
        self.threads: set[str] = set()
        self.called = threading.Event()
        self._failure = failure
        monkeypatch.setattr(flushing, "_flush", self._flush)
        monkeypatch.setattr(flushing, "_BETWEEN", 0.0)

    def _flush(self, handle: int) -> None:
        os.fdatasync(handle)
        self.threads.add(threading.current_thread().name)
        self.called.set()
        if self._failure is not None:
            raise self._failure


SITES = {"layer_0": torch.randn(9, 20)}


def lazily(contents: Contents, flushes: Flushes) -> Contents:
    """The contents, whose rows come only after the first flush."""

    def slabs(activation: Activation) -> Iterator[Any]:
        assert flushes.called.wait(30)
        yield from activation.slabs()

    late = {key: replace(each, slabs=partial(slabs, each)) for key, each in contents.activations.items()}
    return replace(contents, activations=late)


def test_a_shard_goes_to_the_disk_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes, path = Flushes(monkeypatch), tmp_path / "x.h5"
    write.write_file(path, lazily(of_samples([sample_of(0, SITES)], "m", SETTINGS), flushes))
    assert flushes.threads == {"flushing"}
    assert not any(each.name == "flushing" for each in threading.enumerate())
    assert open_run(path)[0]["doc_id"] == 0


def test_a_flush_that_fails_fails_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells of a lost write once; the fsync at the end would not tell of it again."""
    flushes, path = Flushes(monkeypatch, OSError(errno.EIO, "lost")), tmp_path / "x.h5"
    with pytest.raises(
        StoreError, match=r"x\.h5 was not written, and nothing of it was left behind \(Input/output error\)"
    ):
        write.write_file(path, lazily(of_samples([sample_of(0, SITES)], "m", SETTINGS), flushes))
    assert not list(tmp_path.iterdir())


def test_without_a_thread_all_is_left_to_the_fsync_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    write.write_file(tmp_path / "x.h5", of_samples([sample_of(0, SITES)], "m", SETTINGS))
    assert open_run(tmp_path / "x.h5")[0]["doc_id"] == 0


class Disk:
    """Stands in for a disk that is slow to settle the first shard: its fsync waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self._real = whole_files._sync
        monkeypatch.setattr(whole_files, "_sync", self._sync)

    def _sync(self, path: Path) -> None:
        assert path.name != "shard-00000.h5" or self.open.wait(30)
        self._real(path)


def test_next_shard_is_filled_while_one_settles_and_both_get_their_names_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
        made.add([make_sample(seed=0, task="t", doc_id=0)])
        made.add([make_sample(seed=1, task="t", doc_id=1)])  # does not wait for the disk
        made._in_flight.wait_until_filled()
        assert sorted(path.name.split(".")[1] for path in tmp_path.glob(".*.partial")) == ["shard-00000", "shard-00001"]
        time.sleep(0.3)
        assert shard_names(tmp_path) == []  # the second could have its name, and waits for the first
        third = threading.Thread(target=made.add, args=([make_sample(seed=2, task="t", doc_id=2)],))
        third.start()
        third.join(0.3)
        assert third.is_alive()  # two are in flight: a third waits
        disk.open.set()
        third.join(10)
        assert not third.is_alive()
        made.finish()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("ends", ["flush", "error"])
def test_when_the_first_of_two_shards_in_flight_fails_the_second_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    disk = Disk(monkeypatch)
    made = RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1)
    (tmp_path / "shard-00000.h5").mkdir()
    made.add([make_sample(seed=0, task="t", doc_id=0)])
    made.add([make_sample(seed=1, task="t", doc_id=1)])
    made._in_flight.wait_until_filled()
    disk.open.set()
    if ends == "flush":
        with pytest.raises(PathExists, match=r"shard-00000\.h5 exists"):
            made.flush()
        made.close(failed=True)
    else:
        with pytest.warns(UserWarning, match=r"shard-00000\.h5 exists") as told:
            made.close(failed=True)
        assert len(told) == 1
    assert not list(tmp_path.glob(".*.partial"))
    (tmp_path / "shard-00000.h5").rmdir()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [1]
    with RunWriter(tmp_path, "m", SETTINGS, resume=True) as again:
        assert [record["doc_id"] for record in again.records()] == [1]
        again.add([make_sample(seed=0, task="t", doc_id=0)])
        again.finish()
    assert len(open_run(tmp_path)) == 2


def test_rows_of_two_shards_are_in_memory_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the bytes of every tensor that is alive, while the disk is slower than the model."""
    alive, most = [0], [0]
    mutex = threading.Lock()

    def count(n_bytes: int) -> None:
        with mutex:
            alive[0] += n_bytes
            most[0] = max(most[0], alive[0])

    def counted(number: int) -> Sample:
        sites = {key: torch.full((100, 250), float(number)) for key in ("embeddings", "layer_0")}
        for tensor in sites.values():
            count(tensor.nbytes)
            weakref.finalize(tensor, count, -tensor.nbytes)
        return sample_of(number, sites)

    real = whole_files._sync
    monkeypatch.setattr(whole_files, "_sync", lambda path: (time.sleep(0.05), real(path)))
    shard_bytes, sample_bytes = 2_000_000, 200_000
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=shard_bytes) as made:
        for number in range(60):
            made.add([counted(number)])
        made.flush()
        assert alive[0] == 0  # also what holds a shard that has ended lets go of its rows
        made.finish()
    assert len(open_run(tmp_path)) == 60
    assert shard_bytes * 1.5 < most[0] <= 2 * (shard_bytes + sample_bytes)


KILLED = """
import sys, torch
from pathlib import Path
from helpers.samples import sample_of
from AutomaticEval.store.hdf5.writing import rows
from AutomaticEval.store.writer import RunWriter
rows.THREAD_BYTES = 2**20
with RunWriter(Path(sys.argv[1]), "m", {}, shard_bytes=2**24, resume=True) as made:
    done = {record["doc_id"] for record in made.records()}
    print("begun", flush=True)
    for number in range(32):
        if number not in done:
            sites = {f"layer_{layer}": torch.full((1000, 256), number + layer / 8).bfloat16() for layer in range(8)}
            made.add([sample_of(number, sites)])
    made.finish()
"""


def test_killed_while_two_shards_are_written_by_several_threads_the_rest_is_whole(tmp_path: Path) -> None:
    """SIGKILL comes as soon as a file that has no name yet has grown; each process goes on where the one before was killed."""
    folder, moments = tmp_path / "run", random.Random(0)
    n_killed = 0
    while n_killed < 4:
        writing = Forked(["-c", KILLED, str(folder)])
        while "begun" not in writing.said()[0]:
            assert writing.poll() is None
        before = set(shard_names(folder))
        least = moments.randrange(1, 2**24)
        while writing.poll() is None and not any(size >= least for size in partial_sizes(folder)):
            time.sleep(0.001)
        writing.send_signal(signal.SIGKILL)
        if writing.wait().returncode != -signal.SIGKILL:  # it had finished
            break
        n_killed += 1
        assert before <= set(shard_names(folder))
        for name in shard_names(folder):
            assert verify(folder / name) == []
    if n_killed == 4:
        assert Forked(["-c", KILLED, str(folder)]).wait().returncode == 0
    assert n_killed >= 2
    assert not list(folder.glob(".*.partial"))
    run = open_run(folder)
    assert sorted(sample["doc_id"] for sample in run) == list(range(32))
    for sample in run:
        for layer in range(8):
            expected = torch.full((1000, 256), sample["doc_id"] + layer / 8).bfloat16()
            assert same(sample["activations"][f"layer_{layer}"], expected)


def partial_sizes(folder: Path) -> list[int]:
    """Sizes of the shards that have no names yet."""
    sizes = []
    for path in folder.glob(".*.partial/shard-*.h5"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # it has its name now
            continue
    return sizes


def test_too_few_rows_are_a_mistake_that_is_told(tmp_path: Path) -> None:
    """A shard that would lack rows is not written."""
    contents = of_samples(ragged_samples(torch.float32, [4, 4], {"embeddings": 8, "layer_0": 8}), "m", SETTINGS)
    short = contents.activations["layer_0"].__class__(torch.float32, 8, lambda: iter([np.zeros((7, 8), "<u4")]))
    contents.activations["layer_0"] = short  # type: ignore[index]
    with pytest.raises(AssertionError, match="layer_0: 224 bytes of rows came, expected 256"):
        write_file(tmp_path / "a.h5", contents)
    with pytest.raises(CaptureError, match="different sites"):
        of_samples(
            [
                *ragged_samples(torch.float32, [4], {"embeddings": 8}),
                *ragged_samples(torch.float32, [4], {"embeddings": 9}),
            ],
            "m",
            {},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_large_reads_are_the_same_and_checked_whichever_thread_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    path = tmp_path / "a.h5"
    samples = ragged_samples(torch.bfloat16, (3000, 1, 2500, 7), {"layer_0": 300})
    write_file(path, of_samples(samples, "m", SETTINGS))
    monkeypatch.setattr(blocks, "THREAD_BYTES", 2**19)
    monkeypatch.setattr(threads, "MOST_THREADS", n_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    whole = torch.cat([each.parts[0].rows.activations["layer_0"] for each in samples])
    run = open_run(path)
    for at in (slice(None), slice(1, None), slice(109, 5450), slice(108, 5508)):
        assert same(run.rows("layer_0")[at], whole[at])
    extent = run.shards[0].extents["layer_0"]
    with path.open("r+b") as file:
        file.seek((extent.offset or 0) + 4321 * extent.row_bytes + 77)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    rows_per_block = 2**16 // 600
    first = 4321 // rows_per_block * rows_per_block
    damaged = open_run(path).rows("layer_0")
    with pytest.raises(
        DamagedFile, match=rf"layer_0 is not what .* in the rows {first} to {first + rows_per_block - 1}\."
    ):
        damaged[:]
    assert same(damaged[:first], whole[:first])

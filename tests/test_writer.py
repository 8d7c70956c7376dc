"""A run that is written: by a thread that never drops or grows, by one process at a time, whole after any crash."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.places import ROOT
from helpers.samples import SETTINGS, make_sample, same

from AutomaticEval import open_run
from AutomaticEval.errors import CaptureError, DiskFull, FolderInUse, OtherSettings, StoreError
from AutomaticEval.store import writer
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.hdf5.writing.activations import Source
from AutomaticEval.store.run_folder import shard_names
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.writer import RunWriter, shard_bytes_for

TINY = 1_000
"""Bytes of a shard, so that nearly every sample is sealed by itself."""


def numbered(number: int, **fields: Any) -> Any:
    return make_sample(seed=number, task="t", doc_id=number, **fields)


class Gate:
    """Stands in for the disk: each shard waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting, self.samples_waiting = threading.Event(), threading.Event(), 0
        self._real = writer.filled_file
        monkeypatch.setattr(writer, "filled_file", self._write)

    def _write(self, path: Path, held: Any, **options: Any) -> AbstractContextManager[Source]:
        self.waiting.set()
        assert self.open.wait(30)
        return self._real(path, held, **options)


def test_the_model_does_not_wait_for_one_slow_shard_and_waits_for_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
        made.add([numbered(0)])  # handed to the thread
        assert gate.waiting.wait(10)
        blocked = threading.Thread(target=made.add, args=([numbered(1)],))
        blocked.start()
        blocked.join(0.3)
        assert blocked.is_alive()  # one being written, one ready: the producer is held back, nothing is dropped
        gate.open.set()
        blocked.join(10)
        assert not blocked.is_alive()
        made.finish()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 1]


def test_failure_in_the_thread_reaches_the_caller_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = writer.filled_file, []

    def fails_second(path: Path, *args: Any, **options: Any) -> AbstractContextManager[Source]:
        written.append(path.name)
        if len(written) == 2:
            raise DiskFull("the disk is full")
        return real(path, *args, **options)

    monkeypatch.setattr(writer, "filled_file", fails_second)
    with pytest.raises(DiskFull), RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:  # noqa: PT012
        made.add([numbered(0)])
        made.add([numbered(1)])
        made._in_flight.wait_until_ended()
        made.add([numbered(2)])
        raise AssertionError("the failure was not told")
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0]
    assert threading.active_count() == 1 or not any("sealing" in t.name for t in threading.enumerate())


def test_shard_that_failed_before_another_error_is_warned_of(tmp_path: Path) -> None:
    """The shard's file meets a folder where it should get its name, and the error that ends the run is another."""

    def run() -> None:
        with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
            (tmp_path / "shard-00000.h5").mkdir()
            made.add([numbered(0)])
            raise ZeroDivisionError

    with pytest.warns(UserWarning, match=r"shard-00000\.h5 exists") as told, pytest.raises(ZeroDivisionError):
        run()
    assert len(told) == 1


def test_leaving_by_an_exception_seals_what_was_gathered(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunWriter(tmp_path, "m", SETTINGS) as made:  # noqa: PT012
        made.add([numbered(0)])
        raise ZeroDivisionError
    assert len(open_run(tmp_path)) == 1


def test_a_writer_that_is_dropped_gives_its_folder_back_at_once(tmp_path: Path) -> None:
    gc.disable()
    try:
        left = RunWriter(tmp_path / "run", "m", SETTINGS)
        left.add([numbered(0)])
        del left  # nothing refers to it, not even a circle that waits for the garbage collector
        with RunWriter(tmp_path / "run", "m", SETTINGS) as again:
            again.add([numbered(0)])
    finally:
        gc.enable()
    assert len(open_run(tmp_path / "run")) == 1


def test_nothing_is_lost_when_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunWriter(tmp_path / "run", "m", SETTINGS) as run:
        run.add([numbered(0)])
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", refused)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                run.seal()
    assert len(open_run(tmp_path / "run")) == 1


def refused(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_shards_grow_with_the_forecast_and_stay_few() -> None:
    assert shard_bytes_for(0) == shard_bytes_for(2**34) == 256 * 2**20
    assert shard_bytes_for(2**39) == 2 * 2**30
    assert 2**39 / shard_bytes_for(2**39) <= 256
    assert shard_bytes_for(2**50) == 4 * 2**30  # as far as memory allows


def test_small_shards_are_merged_when_the_run_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_SECONDS", 0)  # each sample is sealed by its age
    with RunWriter(tmp_path, "m", SETTINGS) as made:
        for number in range(12):
            made.add([numbered(number)])
        made.flush()
        assert len(shard_names(tmp_path)) == 12
        made.finish()
    assert shard_names(tmp_path) == ["shard-00012.h5"]
    run = open_run(tmp_path)
    for number, sample in enumerate(run):
        assert sample["doc_id"] == number
        assert same(sample["activations"], dict(numbered(number).parts[0].rows.activations))


def test_merged_shard_that_cannot_be_deleted_is_warned_of_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def not_the_second(path: Path, missing_ok: bool = False) -> None:
        if path.name == "shard-00001.h5":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(writer, "SHARD_SECONDS", 0)
    with RunWriter(tmp_path, "m", SETTINGS) as made:
        for number in range(4):
            made.add([numbered(number)])
        made.flush()
        monkeypatch.setattr(Path, "unlink", not_the_second)
        with pytest.warns(UserWarning, match=r"shard-00001\.h5 could not be deleted \(Permission denied\)"):
            made.finish()
    monkeypatch.undo()
    assert shard_names(tmp_path) == [f"shard-{number:05d}.h5" for number in (1, 2, 3, 4)]
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 1, 2, 3]
    assert verify(tmp_path) == []
    rebuild_index(tmp_path)
    assert shard_names(tmp_path) == ["shard-00004.h5"]
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 1, 2, 3]


def test_killed_between_merging_and_deleting_no_sample_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "SHARD_SECONDS", 0)
    monkeypatch.setattr(writer, "write_index", killed)
    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path, "m", SETTINGS) as made:  # noqa: PT012
        for number in range(5):
            made.add([numbered(number)])
        made.finish()
    assert len(shard_names(tmp_path)) == 6  # five, and the one that replaces them
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == list(range(5))
    monkeypatch.undo()
    with RunWriter(tmp_path, "m", SETTINGS, resume=True) as resumed:
        assert [record["doc_id"] for record in resumed.records()] == list(range(5))
        resumed.add([numbered(5)])
        resumed.finish()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == list(range(6))
    assert len(shard_names(tmp_path)) == 1


def test_resume_goes_on_cleans_up_and_keeps_the_run_id(tmp_path: Path) -> None:
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
        made.add([numbered(0)])
    left = tmp_path / f".shard-00001.h5.{0:032x}.partial"
    left.write_bytes(b"half a shard")
    before = open_run(tmp_path).settings["run_id"]
    with RunWriter(tmp_path, "m", SETTINGS, resume=True) as resumed:
        assert not left.exists()
        assert resumed.n_samples == 1
        resumed.add([numbered(1)])
        resumed.finish()
    run = open_run(tmp_path)
    assert run.finished
    assert run.settings["run_id"] == before
    assert [sample["doc_id"] for sample in run] == [0, 1]


def test_run_is_neither_written_into_nor_resumed_with_other_settings(tmp_path: Path) -> None:
    with RunWriter(tmp_path, "m", SETTINGS) as made:
        made.add([numbered(0)])
    with pytest.raises(StoreError, match="holds a run"):
        RunWriter(tmp_path, "m", SETTINGS)
    with pytest.raises(OtherSettings, match="dtype was 'float32' and is 'bfloat16'"):
        RunWriter(tmp_path, "m", {**SETTINGS, "dtype": "bfloat16"}, resume=True)
    with pytest.raises(OtherSettings, match="model was 'm' and is 'other'"):
        RunWriter(tmp_path, "other", SETTINGS, resume=True)
    RunWriter(tmp_path, "m", SETTINGS, resume=True).close()  # what was refused left no lock behind


HOLDS_THE_FOLDER = """
import sys, time
from pathlib import Path
from AutomaticEval.store.writer import RunWriter
with RunWriter(Path(sys.argv[1]), "m", {}) as made:
    print("holding", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_THE_FOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        for resume in (False, True):
            with pytest.raises(FolderInUse, match="another process is writing"):
                RunWriter(tmp_path, "m", {}, resume=resume)
        holder.kill()
    RunWriter(tmp_path, "m", {}).close()


def test_run_h5_shows_all_shards_as_one_file_to_plain_h5py(tmp_path: Path) -> None:
    samples = [make_sample(torch.bfloat16, seed=n, task="t", doc_id=n) for n in range(9)]
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
        made._shard_bytes = 1  # none is merged
        for sample in samples:
            made.add([sample])
        made.finish(Listed.of([{**record, "correct": True} for record in reversed(made.records())]))
    assert len(shard_names(tmp_path)) == 9
    with h5py.File(tmp_path / "run.h5") as file:
        for number, sample in enumerate(reversed(samples)):
            (start,), (stop,) = (
                file[f"segments/{end}"][file["segments/offset"][number] : file["segments/offset"][number + 1]]
                for end in ("start", "stop")
            )
            for key, rows in sample.parts[0].rows.activations.items():
                np.testing.assert_array_equal(file[f"activations/{key}"][start:stop], rows.float().numpy())
            np.testing.assert_array_equal(file["rows/token_id"][start:stop], sample.parts[0].rows.token_ids)
            assert file["samples/doc_id"][number] == 8 - number
        assert file.attrs["state"] == "finished"
    (tmp_path / "shard-00004.h5").unlink()
    with h5py.File(tmp_path / "run.h5") as file:  # never zeros
        rows = file["activations/layer_0"][()]
        assert np.isnan(rows).all(axis=1).sum() == len(samples[4].parts[0].rows.positions)
        assert not (rows == 0).all(axis=1).any()
    with pytest.raises(StoreError, match=r"shard-00004\.h5 is missing"):
        open_run(tmp_path)


def test_folder_that_another_process_of_a_shared_run_still_writes_is_refused(tmp_path: Path) -> None:
    """The first was killed, and the second lives on: neither its files nor its numbers are touched."""
    RunWriter(tmp_path, "m", SETTINGS, share=(0, 2)).close()
    with RunWriter(tmp_path, "m", SETTINGS, share=(1, 2)) as second:
        second.add([numbered(1)])
        (tmp_path / ".its.partial").touch()
        with pytest.raises(FolderInUse):
            RunWriter(tmp_path, "m", SETTINGS, resume=True)
        assert (tmp_path / ".its.partial").exists()
    with RunWriter(tmp_path, "m", {**SETTINGS, "run_id": second.run_id}, resume=True) as alone:
        alone.finish()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [1]


def test_records_that_are_out_of_date_are_refused_and_nothing_is_deleted(tmp_path: Path) -> None:
    with RunWriter(tmp_path, "m", SETTINGS) as made:
        made.add([numbered(0)])
        early = made.table()
        made.add([numbered(1)])
        with pytest.raises(StoreError, match="1 records for"):
            made.finish(early)
        made.finish()
        with pytest.raises(StoreError, match="finished already"):
            made.finish()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 1]
    with pytest.raises(StoreError, match="was closed"):
        made.add([numbered(2)])


def test_interrupt_while_waiting_for_the_disk_forgets_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
        made.add([numbered(0)])
        with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):  # noqa: PT012
            for event in (made._in_flight._shards[0].filled, made._in_flight._shards[0].ended):
                interrupted.setattr(event, "wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
            made.add([numbered(1)])
        gate.open.set()
        made.finish()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 1]


def test_finished_run_is_not_resumed_and_keeps_its_scores(tmp_path: Path) -> None:
    with RunWriter(tmp_path, "m", SETTINGS) as made:
        made.add([numbered(0)])
        made.finish(Listed.of([{**record, "correct": True} for record in made.records()]))
    with pytest.raises(StoreError, match="is finished"):
        RunWriter(tmp_path, "m", SETTINGS, resume=True)
    assert open_run(tmp_path)[0]["correct"] is True


def test_index_of_an_unfinished_run_does_not_hide_what_is_added_later(tmp_path: Path) -> None:
    with RunWriter(tmp_path, "m", SETTINGS) as made:
        made.add([numbered(0)])
    rebuild_index(tmp_path)
    with RunWriter(tmp_path, "m", SETTINGS, resume=True) as resumed:
        resumed.add([numbered(1)])
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 1]


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "store_dtype": "int8"}])
def test_rows_that_do_not_fit_are_refused_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    bad = numbered(1)
    bad.parts[0].rows.activations["layer_0"][0, 0] = float("nan")  # type: ignore[index]
    with RunWriter(tmp_path, "m", settings) as made:
        made.add([numbered(0)])
        with pytest.raises(CaptureError, match="sites, dtypes or widths"):
            made.add([numbered(2, width=4)])
        if "store_dtype" in settings:
            with pytest.raises(CaptureError, match="layer_0 holds values that are infinite or not a number"):
                made.add([bad])
        made.add([numbered(3)])
        made.finish()
    assert [sample["doc_id"] for sample in open_run(tmp_path)] == [0, 3]


def test_threads_that_add_lose_nothing(tmp_path: Path) -> None:
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=1) as made:
        threads = [
            threading.Thread(
                target=lambda first: [made.add([numbered(n)]) for n in range(first, first + 20)], args=(n,)
            )
            for n in (0, 20, 40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.finish()
    assert sorted(sample["doc_id"] for sample in open_run(tmp_path)) == list(range(60))


def test_run_finishes_where_there_is_no_room_to_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_SECONDS", 0)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 50_000))  # type: ignore[attr-defined]
    with RunWriter(tmp_path, "m", SETTINGS) as made:
        for number in range(6):
            made.add([numbered(number)])
        made.finish()
    assert len(shard_names(tmp_path)) == 6
    assert len(open_run(tmp_path)) == 6


def test_prompts_without_rows_count_as_memory_too(tmp_path: Path) -> None:
    with RunWriter(tmp_path, "m", SETTINGS, shard_bytes=100_000) as made:
        for number in range(40):
            made.add([numbered(number, prompt="x" * 10_000)])
        assert len(shard_names(tmp_path)) >= 2


def test_folder_that_was_given_is_kept_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with RunWriter(Path("run"), "m", SETTINGS) as made:
        made.add([numbered(0)])
        monkeypatch.chdir(tmp_path / "b")
        made.finish()
    monkeypatch.chdir(tmp_path / "a")
    run = open_run("run")
    monkeypatch.chdir(tmp_path / "b")
    assert run[0]["doc_id"] == 0


FULL_DISK = """
import sys, threading, time
from pathlib import Path
from AutomaticEval.store import writer
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.hdf5.writing.activations import Source
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from AutomaticEval.evaluation import forecast
forecast.shard_bytes_for = lambda n_bytes: 2**28  # so many small shards would be foreseen not to fit
writer.SHARD_BYTES = 20_000
folder = Path.cwd() / "activations"
def fill():
    while not list(folder.glob("*/shard-00002.h5")):
        time.sleep(0.005)
    with open("filler", "wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
threading.Thread(target=fill, daemon=True).start()
threading.excepthook = lambda args: None
from AutomaticEval.cli.app import main
sys.argv = ["main.py", "--capture_activations", "--benchmark", "demo_facts", "--output_path", sys.argv[1]]
main()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("run as root, who may mount a small disk, to run this")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_fills_up_ends_the_run_with_one_line_and_all_sealed_shards(small_disk: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out")],
        cwd=small_disk,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("DiskFull: the disk is full") == 1
    assert "Traceback" not in done.stderr
    (folder,) = (small_disk / "activations").iterdir()
    assert not list(folder.glob(".*.partial"))
    run = open_run(folder)
    assert not run.finished
    assert len(run) == sum(1 for _ in run) > 0
    assert len(shard_names(folder)) >= 3


@pytest.mark.parametrize("n_kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_sealed_is_lost_or_unreadable(tmp_path: Path, n_kills: int) -> None:
    """See `tests/helpers/kills.py`, which says what is compared after each kill and at the end."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.kills", str(tmp_path), str(n_kills), "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert f"{n_kills} kills over" in done.stdout

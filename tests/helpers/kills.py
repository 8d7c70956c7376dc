"""Kills a capturing process at random moments and resumes it after each kill, until KILLS kills are done.

    PYTHONPATH=.:tests python -m helpers.kills FOLDER KILLS SEED

Each attempt is a real process, forked from this one (whose libraries are loaded), that asks the demo model real prompts and
writes what it captures; SIGKILL ends it. After each kill, plain h5py reads every file that has its final name, and every sample
that was there before must still be there. A complete run must equal a run that was never interrupted. Prints one line.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import h5py
import torch

from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.samples import Sample
from AutomaticEval.selection import Selection
from AutomaticEval.store import writer
from AutomaticEval.store.disk.partial_folders import clear_leftovers
from AutomaticEval.store.hdf5.writing import rows
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.writer import RunWriter

N_BATCHES, BATCH = 12, 4
SHARD_BYTES = 4_000_000
SETTINGS = {"dtype": "float32"}


def capture(loaded: LoadedModel, folder: Path) -> None:
    """Ask every prompt whose sample is not on the disk yet."""
    if (folder / "run.h5").exists():  # killed after the last step
        return
    with RunWriter(folder, "demo", SETTINGS, shard_bytes=SHARD_BYTES, resume=True) as made:
        done = {record["doc_id"] for record in made.records()}
        for batch in range(N_BATCHES):
            numbers = range(batch * BATCH, (batch + 1) * BATCH)
            if done.issuperset(numbers):
                continue
            assert done.isdisjoint(numbers), "a batch was torn"
            prompts = [loaded.tokenizer(f"Question: What is {n} plus {n % 7}?\nAnswer:")["input_ids"] for n in numbers]
            responses = respond(loaded, prompts, Sampling(max_new_tokens=6), Selection.parse())
            made.add([numbered(response.sample, n) for response, n in zip(responses, numbers, strict=True)])
        made.finish()


def numbered(sample: Sample | None, number: int) -> Sample:
    assert sample is not None
    fields = {**sample.fields, "task": "kills", "doc_id": number}
    return Sample(fields, sample.input_ids, sample.generated_ids, sample.parts)


def attempt(loaded: LoadedModel, folder: Path, seconds: float | None) -> bool:
    """Run a process and kill it after `seconds`. Returns whether it had finished before that."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            capture(loaded, folder)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the process failed by itself"
        return True
    return False


def on_disk(folder: Path) -> set[int]:
    """The numbers of the samples that plain h5py reads. It reads all of every file that has its final name."""
    doc_ids: set[int] = set()
    for path in folder.glob("*.h5"):
        with h5py.File(path) as file:
            file.visititems(lambda name, item: item[()] if isinstance(item, h5py.Dataset) else None)
            doc_ids.update(file["samples/doc_id"][()].tolist())
    return doc_ids


def assert_equal(folder: Path, expected: Path) -> None:
    one, other = ({sample["doc_id"]: sample for sample in open_run(path)} for path in (folder, expected))
    assert len(open_run(folder)) == len(one) == N_BATCHES * BATCH
    assert one.keys() == other.keys()
    for number, sample in one.items():
        assert sample["response"] == other[number]["response"]
        assert sample["token_ids"].equal(other[number]["token_ids"])
        for key, wanted in other[number]["activations"].items():
            assert sample["activations"][key].equal(wanted), (number, key)


def main(folder: Path, n_kills: int, seed: int) -> None:
    rows.THREAD_BYTES = 1  # rows are written by several threads, however few they are
    writer.SHARD_SECONDS = 0  # seal a shard after every batch, so that each resume has small shards to merge
    torch.set_num_threads(1)  # a fork loses threads
    loaded = load_model("demo")
    assert loaded.layout.n_layers
    started = time.monotonic()
    assert attempt(loaded, folder / "whole", None)
    whole = time.monotonic() - started
    moments, kills, runs = random.Random(seed), 0, 0
    n_partial = 0
    while kills < n_kills:
        run, before = folder / f"run-{runs}", set[int]()
        while not attempt(loaded, run, moments.uniform(0, whole) if kills < n_kills else None):
            kills += 1
            n_partial += len(list(run.glob(".*.partial")))
            now = on_disk(run)
            assert now >= before, f"lost {sorted(before - now)}"
            before = now
        clear_leftovers(run)  # killed when run.h5 had its name, and its other name was still to go
        assert not list(run.glob(".*.partial"))
        assert_equal(run, folder / "whole")
        shutil.rmtree(run)
        runs += 1
    print(f"{kills} kills over {runs} runs of {whole:.2f} s, {n_partial} of them while a shard was being written")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

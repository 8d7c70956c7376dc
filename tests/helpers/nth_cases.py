"""The actions that `nth_failures.py` repeats: commands of `main.py`, or functions where the command would add nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, tzinfo
from functools import partial
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from AutomaticEval.store import writer
from AutomaticEval.store.export import formats as export
from AutomaticEval.store.hdf5 import write as sealing
from AutomaticEval.store.hdf5.writing import rows
from AutomaticEval.store.upkeep.convert import convert as convert_run
from AutomaticEval.store.upkeep.merge import merge as merge_runs
from AutomaticEval.store.upkeep.prune import prune as prune_run
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from helpers.samples import SETTINGS, make_sample

HEADS = {**SETTINGS, "shape": {"n_heads": 4, "n_kv_heads": 2}}
SMALL_SHARDS = 10_000
"""Bytes of a benchmark's shard: small, so that the run has several shards."""


@dataclass
class Case:
    """An action in its own folder, and the preparation of that folder."""

    act: Callable[[], object]
    before: Callable[[Path], None] = lambda folder: None
    again: Callable[[], object] | None = None
    """The action that goes on after a failure. None: `act` again."""

    later: Callable[[], object] | None = None
    """An action that comes later in the same folder and writes `later…` there."""

    has_model: bool = False
    """Whether the action asks the demo model, which is then loaded before the process is forked."""


def command(*given: str) -> Callable[[], object]:
    """`main.py` with these arguments."""

    def run() -> None:
        from AutomaticEval.cli.app import main

        sys.argv = ["main.py", *given]
        main()

    return run


def a_sample(number: int) -> Any:
    return make_sample(seed=number, task="t", doc_id=number, choice=0, repeat=0)


def make_run(folder: Path, numbers: range) -> None:
    """Write a run with one shard for each question."""
    with writer.RunWriter(folder, "m", HEADS, shard_bytes=1) as made:
        made._shard_bytes = 1  # no shards are merged
        for number in numbers:
            made.add([a_sample(number)])
        made.finish()


def a_run(folder: Path) -> None:
    make_run(folder / "a", range(2))


def two_files(folder: Path) -> None:
    for number, name in enumerate(("a.h5", "b.h5")):
        sealing.write_shard(folder / name, [a_sample(number)], "m", HEADS)


def write_run(*, merged: bool) -> None:
    """Write or resume a run of two samples. merged: its small shards are merged into one."""
    folder = Path("run")
    with writer.RunWriter(folder, "m", HEADS, shard_bytes=2**20 if merged else 1, resume=True) as made:
        done = {record["doc_id"] for record in made.records()}
        for number in range(2):
            if number not in done:
                made.add([a_sample(number)])
                made.seal()
        made.finish()


def merge(to: str) -> None:
    merge_runs([Path("a.h5"), Path("b.h5")], Path(to))


def prune(to: str) -> None:
    prune_run(Path("a.h5"), Path(to), positions="last")


def convert(to: str) -> None:
    convert_run(Path("a.h5"), Path(to), compression="gzip")


def index() -> None:
    rebuild_index(Path("a"))


def index_of_run() -> None:
    rebuild_index(Path("run"))


def to_folder(to: str, source: str, name: str) -> None:
    export.export(Path(source), Path(name), to)


def cut_short(folder: Path) -> None:
    """Leave a benchmark run that was stopped after its first shards."""
    from AutomaticEval.evaluation.benchmark_options import Benchmark
    from AutomaticEval.evaluation.run import run_benchmark
    from AutomaticEval.evaluation.run_output import RunOutput
    from AutomaticEval.models.loading import load_model
    from AutomaticEval.selection import Selection
    from AutomaticEval.store import shared as sharing

    class Stopped(Exception):
        pass

    class Stopping(writer.RunWriter):
        def add(self, samples: Any) -> None:
            if self.n_samples:
                raise Stopped
            super().add(samples)
            self.flush()

    sharing.RunWriter = Stopping  # type: ignore[misc]
    try:
        run_benchmark(
            load_model("demo"),
            Benchmark(("demo",), limit=2),
            Selection.parse(positions="scored"),
            output=RunOutput(folder / "activations"),
        )
    except Stopped:
        pass
    finally:
        sharing.RunWriter = writer.RunWriter  # type: ignore[misc]
    (made,) = (folder / "activations").iterdir()
    made.rename(folder / "activations" / "run")


def benchmark(*more: str) -> Callable[[], object]:
    return command("--capture_activations", "--benchmark", "demo", "--limit", "2", "--output_path", "out", *more)


def benchmark_goes_on() -> None:
    """Give the benchmark command again, with --resume if a run was begun."""
    begun = [path for path in Path("activations").glob("*") if path.is_dir()]
    benchmark(*(part for path in begun for part in ("--resume", str(path))))()


def generate(path: str) -> Callable[[], object]:
    return command("generate", "What is red?", "--save_path", path, "--max_new_tokens", "2")


def exported(to: str, source: str, before: Callable[[Path], None]) -> Case:
    return Case(partial(to_folder, to, source, "x"), before, later=partial(to_folder, to, source, "later"))


RESUMED = benchmark("--resume", "activations/run")
SWEEP = command("heads", "sweep", "--emotion", "anger", "--sample_num", "1", "--max-tokens", "1")
STORE = {
    "run": Case(partial(write_run, merged=False), later=index_of_run),
    "run_merged": Case(partial(write_run, merged=True), later=index_of_run),
    "merge": Case(partial(merge, "all.h5"), two_files, later=partial(merge, "later.h5")),
    "prune": Case(partial(prune, "small.h5"), two_files, later=partial(prune, "later.h5")),
    "index": Case(index, a_run, later=index),
    "hdf5": Case(partial(convert, "x.h5"), two_files, later=partial(convert, "later.h5")),
    "safetensors": exported("safetensors", "a", a_run),
    "npz": exported("npz", "a.h5", two_files),
    "arrow": exported("arrow", "a.h5", two_files),
    "transformer_lens": exported("transformer_lens", "a.h5", two_files),
}
MODEL = {
    "generate": Case(generate("new/one.h5"), later=generate("new/later.h5"), has_model=True),
    "benchmark": Case(benchmark(), again=benchmark_goes_on, has_model=True),
    "resume": Case(RESUMED, cut_short, has_model=True),
    "sweep": Case(SWEEP, has_model=True),
}
CASES = {**STORE, **MODEL}


class Still(datetime):
    """A clock that stands still, so that equal runs have equal bytes and are read once."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2026, 1, 1, tzinfo=tz)


def begin(names: list[str]) -> None:
    """Load everything that the cases need, before any process is forked."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)  # a fork loses threads
    rows.THREAD_BYTES = 1  # each site is written by a thread of its own
    tqdm.monitor_interval = 0
    sealing.datetime = Still  # type: ignore[misc]
    writer.uuid4 = lambda: UUID(int=0)  # type: ignore[assignment]
    if any(CASES[name].has_model for name in names):
        from lm_eval import evaluator

        from AutomaticEval.models.loading import load_model

        evaluator.add_env_info = lambda results: None  # it asks pip, for three seconds
        evaluator.get_git_commit_hash = lambda: None
        writer.SHARD_BYTES = SMALL_SHARDS
        assert load_model("demo").layout.n_layers
    assert threading.active_count() == 1

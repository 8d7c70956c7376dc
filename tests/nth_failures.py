"""Gives commands of `main.py` again and again, each time with another call of the C library failing.

    LD_PRELOAD=nth_failure.so python tests/nth_failures.py nth_failure.so FOLDER N CASE…

nth_failure.so: `nth_failure.c`, compiled. N: so many failures of each case, spread over all calls; 0: every call, in every way. Each
attempt is a real process, forked from this one (whose libraries and model are loaded), that runs the command in a fresh folder and
exits as any process does. `examine` says what must hold after it. Prints a line a case.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from AutomaticEval import errors
from AutomaticEval.cli.app import main as command_line
from AutomaticEval.evaluation.benchmark import Benchmark
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection
from AutomaticEval.store import export, maintenance, writer
from AutomaticEval.store.files import prepare_folder
from AutomaticEval.store.reader import open_run

WAYS = [(errno.ENOSPC, True), (errno.EIO, False), (errno.EACCES, False), (errno.ENOSPC, False)]
"""errno, and whether the disk stays so."""
TIMES = re.compile(r"\d{8}_\d{6}(_\d+)?|\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+")
VOLATILE = (
    "date",
    "start_time",
    "end_time",
    "total_evaluation_time_seconds",
    "_fingerprint",
    "run_id",
    "timestamp",
    "created",
)
"""What tells the time, or is drawn by chance."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit status; below 0: the signal that killed it."""

    said: str
    n_calls: int
    failed: str


@dataclass
class Case:
    """A command, and what must be in its folder before."""

    command: list[str]
    before: Callable[[Path], None] = lambda folder: None


class Injection:
    """The library that lets calls fail."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.nth_count.restype = ctypes.c_long
        self._library.nth_arm.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)
        self._library.nth_failed.restype = ctypes.c_char_p

    def run(self, command: list[str], folder: Path, n: int = 0, code: int = 0, *, stays: bool = False) -> Ended:
        """A process whose n-th call in a folder fails; 0: none."""
        said = folder.with_name(f"{folder.name}.said")
        self._library.nth_arm(n, code, stays)
        child = os.fork()
        if not child:
            self._library.nth_watch(str(folder).encode())
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(handle, stream)
            os.chdir(folder)
            leave(status_of(command))
        _, status = os.waitpid(child, 0)
        self._library.nth_watch(b"")
        return Ended(
            os.waitstatus_to_exitcode(status),
            said.read_text(errors="replace"),
            self._library.nth_count(),
            self._library.nth_failed().decode(errors="replace"),
        )


def status_of(command: list[str]) -> int:
    """Runs a command in this process."""
    sys.argv = ["main.py", *command]
    try:
        command_line()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(status: int) -> None:
    """As an interpreter does, also through what C libraries do at their exit, but for two seconds of freeing memory."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).exit(status)


def make_run(folder: Path, first: int, n: int, *, finish: bool = True) -> None:
    """A run of some questions, in several shards."""
    from test_store import SETTINGS, make_sample

    settings = {**SETTINGS, "shape": {"n_heads": 4, "n_kv_heads": 2}}
    with writer.RunWriter(folder, "m", settings, shard_bytes=1) as made:
        made._shard_bytes = 1  # none is merged
        for number in range(first, first + n):
            made.add([make_sample(seed=number, task="t", doc_id=number, choice=0, repeat=0)])
        if finish:
            made.finish()


def runs(folder: Path) -> None:
    make_run(folder / "a", 0, 2)
    make_run(folder / "b", 2, 1)


def cut_short(folder: Path) -> None:
    """A benchmark run that was stopped after the first shards."""

    class Stopped(Exception):
        pass

    class Stopping(writer.RunWriter):
        def add(self, samples: Any) -> None:
            if self.n_samples:
                raise Stopped
            super().add(samples)
            self.flush()

    from AutomaticEval.evaluation.folder import Keeping
    from AutomaticEval.store import sharing

    asked = Benchmark(("demo",), limit=2)
    sharing.RunWriter = Stopping  # type: ignore[misc]
    try:
        run_benchmark(
            load_model("demo"), asked, Selection.parse(positions="scored"), keeping=Keeping(folder / "activations")
        )
    except Stopped:
        pass
    finally:
        sharing.RunWriter = writer.RunWriter  # type: ignore[misc]
    (made,) = (folder / "activations").iterdir()
    made.rename(folder / "activations" / "run")


CAPTURE = ["--capture_activations", "--benchmark", "demo", "--limit", "2", "--output_path", "out"]
CASES = {
    "benchmark": Case(CAPTURE),
    "resume": Case([*CAPTURE, "--resume", "activations/run"], cut_short),
    "generate": Case(["generate", "What is red?", "--save_path", "new/one.h5", "--max_new_tokens", "2"]),
    "sweep": Case(["heads", "sweep", "--emotion", "anger", "--sample_num", "1", "--max-tokens", "1"]),
    "merge": Case(["merge", "a", "b", "-o", "all.h5"], runs),
    "prune": Case(["prune", "a", "-o", "small.h5", "--positions", "last"], runs),
    "index": Case(["index", "a"], runs),
    "hdf5": Case(["export", "a", "-o", "x.h5", "--to", "hdf5", "--compression", "gzip"], runs),
    **{to: Case(["export", "a", "-o", "x", "--to", to], runs) for to in export.FORMATS},
}


def contents_of(folder: Path) -> dict[str, Any]:
    """All that is in a folder, by names without times: of runs and HDF5 files the samples, whatever shards they are in."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = TIMES.sub("T", str(path.relative_to(folder)))
        if (path / "run.h5").exists() or (path.is_dir() and list(path.glob("shard-*.h5"))):
            found[name] = samples_of(path)
        elif path.is_dir():
            found[name] = "folder"
        elif path.name == "run.h5" or re.fullmatch(r"shard-\d+\.h5", path.name):
            continue
        else:
            found[name] = file_of(path)
    return found


def samples_of(path: Path) -> list[str]:
    """Of every sample, all numbers and texts."""
    run = open_run(path)
    found = [f"finished: {run.finished}"]
    for sample in run:
        kept = {
            name: value
            for name, value in sample.items()
            if name not in ("settings", "path", "shard", "index", "random_state", *VOLATILE)
        }
        found.append(repr(_plain(kept)))
    return sorted(found)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in sorted(value.items())}
    return value


def file_of(path: Path) -> Any:
    if path.suffix == ".h5":
        return samples_of(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: (each.dtype.str, each.tolist()) for name, each in arrays.items()}
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [_without_times(json.loads(line)) for line in lines]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(each) for name, each in value.items() if name not in VOLATILE}
    if isinstance(value, list):
        return [_without_times(each) for each in value]
    return value


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "run.h5")
    }


NAMED = tuple(
    name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.StoreError)
)


def examine(
    injection: Injection, case: Case, original: Path, folder: Path, ended: Ended, clean: dict[str, Any]
) -> Iterator[str]:
    """What is wrong after an attempt; nothing when all is as it must be. Gives the command again."""
    before = samples_before(original)
    if ended.code not in (0, 1, 2):
        yield f"it ended with {ended.code}"
    if "Traceback" in ended.said:
        yield "it ended in a traceback"
    last = (ended.said.strip().splitlines() or [""])[-1]
    if ended.code and not last.startswith(tuple(f"{name}: " for name in NAMED)):
        yield "its last line names no error of the store"
    for path in folder.rglob("*.h5"):
        if ".partial" not in str(path) and path.name != "run.h5":
            yield from maintenance.verify(path)
    for path in folder.rglob("*.json*"):
        if ".partial" not in str(path):
            try:
                file_of(path)
            except ValueError as broken:
                yield f"{path} is not whole: {broken}"
    lost = [name for name, samples in before.items() if not set(samples) <= set(samples_there(folder / name))]
    if lost:
        yield f"samples of {lost} are lost"
    if case.before is runs:
        after = bytes_of(folder)
        yield from (f"{name} was changed" for name, found in bytes_of(original).items() if after.get(name) != found)
    if ended.code == 0:
        clear(folder)
        if contents_of(folder) != clean:
            yield f"it ended with 0, and {difference(contents_of(folder), clean)}"
        return
    again = injection.run(goes_on(case, folder), folder)
    if again.code:
        yield f"the same command does not go on: {again.said[-2000:]}"
    elif contents_of(folder) != clean:
        yield f"when it went on, {difference(contents_of(folder), clean)}"


def samples_before(folder: Path) -> dict[str, list[str]]:
    return {name: samples_there(folder / name) for name in ("a", "b", "activations/run") if (folder / name).exists()}


def samples_there(folder: Path) -> list[str]:
    """Without the verdicts, which come when a run is finished."""
    run = open_run(folder)
    return [
        repr(_plain({name: sample[name] for name in ("doc_id", "choice", "activations", "token_ids")}))
        for sample in run
    ]


def clear(folder: Path) -> None:
    """What a command does that comes later; in a process of its own, for the locks."""
    child = os.fork()
    if not child:
        for each in {path.parent for path in folder.rglob(".*.partial")}:
            prepare_folder(each)
        os._exit(0)
    os.waitpid(child, 0)


def goes_on(case: Case, folder: Path) -> list[str]:
    """The same command, with --resume where a run was begun."""
    begun = [path for path in (folder / "activations").glob("*") if path.is_dir()]
    if case.command[0] != "--capture_activations" or "--resume" in case.command or not begun:
        return case.command
    (run,) = begun
    return [*case.command, "--resume", str(run.relative_to(folder))]


def difference(found: dict[str, Any], clean: dict[str, Any]) -> str:
    more, fewer = sorted(found.keys() - clean.keys()), sorted(clean.keys() - found.keys())
    other = [name for name in found.keys() & clean.keys() if found[name] != clean[name]]
    return f"too much: {more}, missing: {fewer}, other than in a clean run: {other}"


def repeat(name: str, case: Case, injection: Injection, folder: Path, n_failures: int) -> int:
    """Returns how many of the attempts were not as they must be."""
    original, clean_folder, at = (folder / f"{name}-{each}" for each in ("before", "clean", "at"))
    original.mkdir(parents=True)
    case.before(original)
    shutil.copytree(original, clean_folder)
    warm = folder / f"{name}-warm"
    shutil.copytree(original, warm)
    with chdir(warm), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        assert status_of(case.command) == 0  # all that is imported on the way is there for the attempts
    gc.freeze()
    ended = injection.run(case.command, clean_folder)
    assert ended.code == 0, ended.said
    clean = contents_of(clean_folder)
    n_calls = ended.n_calls
    every = [(n, *way) for n in range(1, n_calls + 1) for way in WAYS]
    chosen = every
    if n_failures:  # each way in turn
        places = np.linspace(0, n_calls - 1, min(n_failures, n_calls)).round().astype(int)
        chosen = [(int(n) + 1, *WAYS[number % len(WAYS)]) for number, n in enumerate(places)]
    wrong, outcomes, started = 0, Counter[str](), time.monotonic()
    for n, code, stays in chosen:
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(original, at)
        ended = injection.run(case.command, at, n, code, stays=stays)
        problems = list(examine(injection, case, original, at, ended, clean))
        if not ended.failed:  # a run's calls are not always equally many
            outcomes["not reached"] += 1
        outcomes["survived" if ended.code == 0 else "refused"] += 1
        if problems:
            wrong += 1
            how = f"{errno.errorcode[code]}{' for ever' if stays else ''}"
            print(
                f"{name}, call {n} ({ended.failed}) with {how}:",
                *problems,
                ended.said[-1500:],
                sep="\n    ",
                flush=True,
            )
    calls = len({n for n, _, _ in chosen})
    told = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    print(
        f"{name}: {calls} of {n_calls} calls, {len(chosen)} failures: {told}; {wrong} wrong; {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return wrong


def main(library: str, folder: Path, n_failures: int, names: list[str]) -> None:
    torch.set_num_threads(1)  # no thread of ours is there to be lost in a fork
    tqdm.monitor_interval = 0
    writer.SHARD_BYTES = 10_000  # several shards
    injection = Injection(library)
    loaded = load_model("demo")
    assert loaded.layout.n_layers
    wrong = sum(repeat(name, CASES[name], injection, folder.resolve(), n_failures) for name in names or CASES)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

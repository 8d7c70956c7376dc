"""Thousands of changed files: each is read, or refused by one of our errors; no crash, no endless loop, no memory beyond a bound."""

from __future__ import annotations

import faulthandler
import io
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from helpers.mutants import Case, corpus, mutate, write_case

from AutomaticEval import open_run
from AutomaticEval.cli.show import _show_run, _show_sample
from AutomaticEval.errors import AutomaticEvalError
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.hdf5.extents import naming
from AutomaticEval.store.run import Run
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.verify import verify

BOUND = 256 * 2**20
"""That one reading of a file of at most 130 KB may take, beside what the process has."""
SECONDS = 10
"""Of the processor, for one changed file; six times as long by the clock, for a machine that others use, too."""
N_CHILDREN = 2
BATCH = 500
"""Changed files that one child reads; the next one begins with memory of its own."""


def show(run: Run) -> None:
    with redirect_stdout(io.StringIO()):
        (_show_run if len(run) > 1 else _show_sample)(run if len(run) > 1 else run[0])


READS: dict[str, Callable[[Run], Any]] = {
    "table": lambda run: run.table(),
    "sample": lambda run: [run[number] for number in range(-1, min(len(run), 1))],
    "one site": lambda run: [run.read(0, key) for key in run.keys[-1:] if len(run)],
    "records": lambda run: run.records(),
    "activations": lambda run: [run.activations(key) for key in run.keys[:1]],
    "rows": lambda run: [run.rows(key)[:] for key in run.keys],
    "finite": lambda run: (run.non_finite, run.finite()),
    "show": show,
}
"""What is done with a run that is open."""
COPIES: dict[str, Callable[[Path, Path], Any]] = {
    "verify": lambda path, made: verify(path),
    "merge": lambda path, made: merge([path], made),
    "prune": lambda path, made: prune(path, made, positions="last"),
    "convert": lambda path, made: convert(path, made, dtype="float16"),
    "export": lambda path, made: export(path, made, "npz"),
}
"""What is done with a file that is not open."""


Door = Callable[[], Any]


def doors(path: Path, made: Path, names: Sequence[str]) -> Iterator[tuple[str, Door]]:
    """Ways in to a file; those of an open run only where it opens."""
    runs: list[Run] = []
    yield "open", lambda: runs.append(open_run(path))
    for name in names:
        if name in READS and runs:
            yield name, partial(READS[name], runs[0])
        elif name in COPIES:
            yield name, partial(COPIES[name], path, made)


def some_doors(draw: random.Random) -> list[str]:
    """A few, those that take long now and then: all of them together take ten times as long."""
    quick = draw.sample([name for name in READS if name != "show"], 1)
    slow = draw.choice([*COPIES, "show"])
    return quick + [name for name, one_of in (("verify", 10), (slow, 30)) if draw.randrange(one_of) == 0]


def not_ours(failure: BaseException) -> str | None:
    """What is wrong with an exception; None where it is one of ours, and none for memory."""
    cause: BaseException | None = failure
    while cause is not None:
        if (
            isinstance(cause, MemoryError)
            or "memory allocation failed" in str(cause)
            or "Cannot allocate" in str(cause)
        ):
            return f"it takes more than {BOUND} bytes: {failure!r}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(failure, AutomaticEvalError):
        return None
    return "".join(traceback.format_exception(failure)[-6:])


def attempt(case: Case, folder: Path, names: Sequence[str]) -> tuple[int, list[str]]:
    """How many doors read it, and what went wrong."""
    path, made = folder if len(case) > 1 else folder / next(iter(case)), folder.with_name("made")
    n_read, wrong = 0, []
    for name, door in doors(path, made, names):
        try:
            door()
            n_read += 1
        except Exception as failure:
            told = not_ours(failure)
            if told:
                wrong.append(f"{name}: {told}")
        if made.is_dir():
            shutil.rmtree(made)
        made.unlink(missing_ok=True)
    return n_read, wrong


def try_seed(number: int, cases: dict[str, Case], folder: Path, every_door: bool) -> tuple[str, int, list[str]]:
    draw = random.Random(number)
    names = [
        name for name in cases for _ in range(1 if len(cases[name]) > 1 else 4 if "/" in name else 20)
    ]  # a run, and a kept file with every column, take longer
    name = draw.choice(names)
    here = folder / "case"
    here.mkdir()
    try:
        write_case(cases[name], here)
        done = mutate(cases[name], here, draw)
        n_read, wrong = attempt(cases[name], here, [*READS, *COPIES] if every_door else some_doors(draw))
    finally:
        shutil.rmtree(here)
    return f"{name}, {done}", n_read, wrong


def child(numbers: range, cases: dict[str, Case], folder: Path, told: Any, every_door: bool) -> None:
    """Tells of each seed when it begins, and how it ended."""
    warnings.simplefilter("ignore")
    faulthandler.disable()  # a death is told with its seed
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # HDF5 does not return to Python: the process ends
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BOUND, used + BOUND))
    for number in numbers:
        told.send(number)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(6 * SECONDS)
        told.send(try_seed(number, cases, folder, every_door))
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    told.close()


class Tally:
    """What all seeds came to."""

    def __init__(self) -> None:
        self.n_tried = self.n_read = self.n_refused = 0
        self.wrong: list[str] = []

    def blame(self, number: int, what: str) -> None:
        self.wrong.append(f"seed {number} {what}")
        print(self.wrong[-1], flush=True)

    def add(self, number: int, what: str, n_read: int, wrong: list[str]) -> None:
        self.n_tried += 1
        self.n_read += n_read > 0
        self.n_refused += n_read == 0
        for each in wrong:
            self.blame(number, f"({what}): {each}")


@contextmanager
def place() -> Iterator[Path]:
    """In memory where there is such a place: each file is written, and what is made of it is synced."""
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


def check_whole(cases: dict[str, Case], folder: Path) -> None:
    """Files that were not changed are read through every door."""
    for name, case in cases.items():
        (folder / "whole").mkdir()
        write_case(case, folder / "whole")
        n_read, wrong = attempt(case, folder / "whole", [*READS, *COPIES])
        assert (n_read, wrong) == (1 + len(READS) + len(COPIES), []), f"{name} is not read: {wrong}"
        shutil.rmtree(folder / "whole")


def fuzz(start: int, n: int, *, every_door: bool = False, most_wrong: int = 20) -> Tally:
    tally = Tally()
    with place() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = corpus(folder)
        check_whole({"float32": cases["float32"]}, folder)  # loads what the doors load when they are first used
        waiting = [range(at, min(at + BATCH, start + n)) for at in range(start, start + n, BATCH)][::-1]
        running: dict[Any, tuple[Any, range, Path]] = {}
        fork = multiprocessing.get_context("fork")
        begun: dict[Any, int] = {}
        n_begun = 0
        while (waiting and len(tally.wrong) < most_wrong) or running:
            while waiting and len(running) < N_CHILDREN and len(tally.wrong) < most_wrong:
                numbers, own = waiting.pop(), folder / f"child-{n_begun}"
                n_begun += 1
                own.mkdir()
                ours, theirs = fork.Pipe(duplex=False)
                process = fork.Process(target=child, args=(numbers, cases, own, theirs, every_door), daemon=True)
                process.start()
                theirs.close()
                running[ours] = process, numbers, own
            for ours in connection.wait(list(running)):
                process, numbers, own = running[ours]
                try:
                    said = ours.recv()
                except EOFError:
                    process.join()
                    del running[ours]
                    number = begun.pop(ours, numbers.start)
                    shutil.rmtree(own)
                    if process.exitcode:
                        tally.blame(number, f"({process.exitcode} is how the process ended)")
                        if number + 1 < numbers.stop:
                            waiting.append(range(number + 1, numbers.stop))
                    continue
                if isinstance(said, int):
                    begun[ours] = said
                else:
                    tally.add(begun[ours], *said)
    return tally


def test_changed_files_are_read_or_refused_by_our_errors() -> None:
    found = fuzz(0, 2000)
    assert not found.wrong, "\n".join(found.wrong)
    assert found.n_tried == 2000
    assert min(found.n_read, found.n_refused) > 400, "nearly all are read, or refused at once: the changes test little"


@pytest.mark.slow
def test_many_changed_files_are_read_or_refused_by_our_errors() -> None:
    """Through every door; hours on two cores."""
    with place() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_whole(corpus(folder), folder)
    found = fuzz(10**6, 100_000, every_door=True)
    assert not found.wrong, "\n".join(found.wrong)


def too_much(run: Run) -> None:
    with naming(run.path):
        np.empty(2 * BOUND, np.uint8)


WRONG: dict[str, tuple[Callable[[Run], Any], str]] = {
    "an exception that is not ours": (lambda run: {}["x"], "KeyError"),
    "memory that is refused": (too_much, "it takes more than"),
    "a process that ends": (lambda run: os.abort(), f"-{signal.SIGABRT.value} is how"),
    "no end": (lambda run: time.sleep(60), f"-{signal.SIGALRM.value} is how"),
    "a loop": (lambda run: sum(itertools.count()), f"-{signal.SIGPROF.value} is how"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_goes_wrong_is_told_with_its_seed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    door, told = WRONG[wrong]
    monkeypatch.setitem(READS, "table", door)
    monkeypatch.setattr("test_fuzz.SECONDS", 2)
    monkeypatch.setattr("test_fuzz.mutate", lambda case, folder, draw: "nothing changed")
    monkeypatch.setattr("test_fuzz.check_whole", lambda cases, folder: None)
    found = fuzz(7, 1, every_door=True)
    assert found.wrong
    assert found.wrong[0].startswith("seed 7 (")
    assert told in found.wrong[0]


if __name__ == "__main__":
    at = time.monotonic()
    found = fuzz(int(sys.argv[1]), int(sys.argv[2]), every_door=len(sys.argv) > 3, most_wrong=10**6)
    print(
        found.n_tried,
        "tried",
        found.n_read,
        "read",
        found.n_refused,
        "refused",
        f"{time.monotonic() - at:.1f} s, processor {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.1f} s",
    )

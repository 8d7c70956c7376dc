"""Repeats an action; each time another call of the C library fails.

    LD_PRELOAD=nth_failure.so PYTHONPATH=.:tests python -m helpers.nth_failures nth_failure.so FOLDER HOW CASE…

nth_failure.so is `nth_failure.c`, compiled. HOW is a name of WAYS: each call that changes something fails in that way. With `turns`
the calls fail in these ways in turn; with `reads` each call that opens a file for reading fails. CASE is a name of `nth_cases.py`;
`CASE/N` lets only every N-th call fail. Each attempt is a real process, forked from this one (which has loaded the libraries and the
model), and acts in a fresh folder. `examine` says what must hold after it. Prints one line for each case.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from AutomaticEval import errors
from AutomaticEval.store.disk.whole_files import prepare_folder
from helpers.nth_cases import CASES, begin
from helpers.nth_contents import bytes_of, contents_of, difference, file_of, problems_of, rows_there, state_of


class Way(NamedTuple):
    code: int
    stays: bool = False
    """Whether all later calls that need room fail, too, as on a full disk."""

    changes: bool = True


WAYS = {
    "full": Way(errno.ENOSPC, stays=True),
    "broken": Way(errno.EIO),
    "denied": Way(errno.EACCES),
    "full_once": Way(errno.ENOSPC),
    "short": Way(0),
    "interrupted": Way(errno.EINTR),
}
HARMLESS = (0, errno.EINTR)
"""A write that ends early, and is to be gone on with."""
READS = [Way(errno.EIO, changes=False), Way(errno.EACCES, changes=False), Way(errno.EMFILE, changes=False)]
LONGEST = 120
"""Seconds after which an attempt is killed."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit status; a negative number is the signal that killed it."""

    said: str
    n_calls: dict[bool, int]
    """True: calls that changed something. False: calls that opened a file for reading."""

    failed: str


class Injection:
    """The C library that makes calls fail."""

    def __init__(self, library: str) -> None:
        _hdf5()
        self._library = ctypes.CDLL(library)
        self._library.nth_count.restype = ctypes.c_long
        self._library.nth_arm.argtypes = (ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int)
        self._library.nth_failed.restype = ctypes.c_char_p

    def run(self, act: Callable[[], object], folder: Path, n: int = 0, way: Way = Way(0)) -> Ended:
        """Run `act` in a process whose n-th call in the folder fails. n = 0: no call fails."""
        said = folder.with_name(f"{folder.name}.said")
        self._library.nth_arm(way.changes, n, way.code, way.stays)
        child = os.fork()
        if not child:
            signal.alarm(LONGEST)
            self._library.nth_watch(str(folder).encode())
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(handle, stream)
            os.chdir(folder)
            leave(status_of(act))
        _, status = os.waitpid(child, 0)
        return Ended(
            os.waitstatus_to_exitcode(status),
            said.read_text(errors="replace"),
            {changes: self._library.nth_count(changes) for changes in (False, True)},
            self._library.nth_failed().decode(errors="replace"),
        )

    def rest(self) -> None:
        """Stop counting calls."""
        self._library.nth_watch(b"")


def status_of(act: Callable[[], object]) -> int:
    """Act in this process and print errors as `main.py` does. Returns the exit status."""
    try:
        act()
    except SystemExit as ended:
        return int(ended.code or 0)
    except errors.AutomaticEvalError as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(status: int) -> None:
    """End as the interpreter does, HDF5's own exit included, but without freeing memory, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _hdf5().H5close()
    os._exit(status)


@cache
def _hdf5() -> Any:
    """The HDF5 library that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    (path,) = {line.split()[-1] for line in lines if re.search(r"/libhdf5[.-]\S*$", line)}
    return ctypes.CDLL(path)


NAMED = tuple(
    f"{name}: " for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.StoreError)
)


class Attempts:
    """All attempts of one case."""

    def __init__(self, name: str, injection: Injection, folder: Path) -> None:
        self.name, self.case, self.injection = name, CASES[name], injection
        self.original, self.clean_folder, self.at = (folder / f"{name}-{each}" for each in ("before", "clean", "at"))
        self.original.mkdir(parents=True)
        self.case.before(self.original)
        shutil.copytree(self.original, self.clean_folder)
        warm = folder / f"{name}-warm"
        shutil.copytree(self.original, warm)
        with chdir(warm), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            assert status_of(self.case.act) == 0  # the attempts then import nothing more
        gc.freeze()
        ended = injection.run(self.case.act, self.clean_folder)
        injection.rest()
        assert ended.code == 0, ended.said
        self.n_calls, self.clean = ended.n_calls, contents_of(self.clean_folder)
        self.before = bytes_of(self.original)
        self.rows = {path: rows_there(self.original / path) for path in runs_in(self.original)}
        self.outcomes = Counter[str]()
        self._good: set[Any] = set()
        """States of the folder from which the repeated command has gone on correctly."""

        self._came_later = False

    def attempt(self, n: int, way: Way) -> list[str]:
        """Make one attempt. Returns its problems."""
        shutil.rmtree(self.at, ignore_errors=True)
        shutil.copytree(self.original, self.at)
        ended = self.injection.run(self.case.act, self.at, n, way)
        self.injection.rest()
        if not ended.failed:  # the number of calls varies a little between runs
            self.outcomes["not reached"] += 1
        self.outcomes["survived" if ended.code == 0 else "refused"] += 1
        problems = list(self.examine(ended))
        if ended.code and way.code in HARMLESS:
            problems.append("a write that ended early was not gone on with")
        if problems:
            self.outcomes["wrong"] += 1
            how = f"{errno.errorcode.get(way.code, 'a short write')}{' for ever' if way.stays else ''}"
            kind = "change" if way.changes else "reading"
            lines = [f"{self.name}, {kind} {n} ({ended.failed}) with {how}:", *problems, ended.said[-1500:]]
            print(*lines, sep="\n    ", flush=True)
        return problems

    def examine(self, ended: Ended) -> Iterator[str]:
        """Give each problem of an attempt. Repeats the action if the attempt failed."""
        if ended.code not in (0, 1, 2):
            yield f"it ended with {ended.code}"
        if "Traceback" in ended.said:
            yield "it ended in a traceback"
        last = (ended.said.strip().splitlines() or [""])[-1]
        if ended.code and not last.startswith(NAMED):
            yield "its last line names no error of the store"
        yield from self._kept()
        if ended.code == 0:
            yield from self._cleared()
            if contents_of(self.at) != self.clean:
                yield f"it ended with 0, and {difference(contents_of(self.at), self.clean)}"
            return
        state = state_of(self.at)
        if state in self._good:
            return
        again = self.injection.run(self.case.again or self.case.act, self.at)
        self.injection.rest()
        if again.code:
            yield f"the same does not go on: {again.said[-2000:]}"
        elif contents_of(self.at) != self.clean:
            yield f"when it went on, {difference(contents_of(self.at), self.clean)}"
        else:
            self._good.add(state)

    def _kept(self) -> Iterator[str]:
        """Give each problem of what must be whole, or unchanged, whatever happened."""
        for path in self.at.rglob("*.h5"):
            if ".partial" not in str(path) and path.name != "run.h5":
                yield from problems_of(path)
        for path in self.at.rglob("*.json*"):
            if ".partial" not in str(path):
                try:
                    file_of(path)
                except ValueError as broken:
                    yield f"{path} is not whole: {broken}"
        after = bytes_of(self.at)
        if not self.case.again and self.name != "resume":
            yield from (f"{name} was changed" for name, digest in self.before.items() if after.get(name) != digest)
        for path, rows in self.rows.items():
            if not rows <= rows_there(self.at / path):
                yield f"samples of {path} are lost"

    def _cleared(self) -> Iterator[str]:
        """Give each leftover that a later action does not remove. Later attempts use `clear`, the first step of every action."""
        left = {path.parent for path in self.at.rglob(".*.partial")}
        if left and self.case.later and not self._came_later:
            self._came_later = True
            self.outcomes["cleared by a later command"] += 1
            later = self.injection.run(self.case.later, self.at)
            self.injection.rest()
            if later.code:
                yield f"what comes later fails: {later.said[-2000:]}"
            for made in self.at.rglob("later*"):
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            yield from (f"{each} is still there" for each in self.at.rglob(".*.partial"))
        elif left:
            clear(left)


def runs_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if list(path.glob("shard-*.h5"))]


def clear(folders: set[Path]) -> None:
    """Remove leftovers as every command does first; in a new process, because locks belong to processes."""
    child = os.fork()
    if not child:
        for each in folders:
            prepare_folder(each)
        os._exit(0)
    os.waitpid(child, 0)


def chosen(how: str, step: int, n_calls: dict[bool, int]) -> list[tuple[int, Way]]:
    """The numbers of the calls that fail, and how each fails."""
    ways = {"turns": list(WAYS.values()), "reads": READS}.get(how) or [WAYS[how]]
    calls = range(1, n_calls[ways[0].changes] + 1, step)
    return [(n, ways[number % len(ways)]) for number, n in enumerate(calls)]


def repeat(asked: str, how: str, injection: Injection, folder: Path) -> int:
    """Make all attempts of one case. Returns the number of attempts with problems."""
    name, _, step = asked.partition("/")
    attempts = Attempts(name, injection, folder)
    started = time.monotonic()
    failures = chosen(how, int(step or 1), attempts.n_calls)
    wrong = sum(bool(attempts.attempt(n, way)) for n, way in failures)
    seconds = time.monotonic() - started
    told = "".join(f", {count} {what}" for what, count in sorted(attempts.outcomes.items()) if what != "wrong")
    print(
        f"{name}, {how}: {attempts.n_calls[True]} changes, {attempts.n_calls[False]} readings, {len(failures)} failures{told}; "
        f"{wrong} wrong; {seconds:.0f} s, {seconds / max(1, len(failures)):.2f} s each",
        flush=True,
    )
    return wrong


def main(library: str, folder: Path, how: str, asked: list[str]) -> None:
    begin([each.partition("/")[0] for each in asked])
    injection = Injection(library)
    sys.exit(1 if sum(repeat(each, how, injection, folder.resolve()) for each in asked) else 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:])

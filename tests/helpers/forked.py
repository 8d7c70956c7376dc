"""Programs run in processes of their own that need not import torch, transformers and lm-eval again, which takes 4 to 9 seconds.

A server, one for each test worker, has the libraries and no threads; every program runs in a process forked from it: with its own working folder, environment,
output and signals, and killed as any other. What depends on how the libraries are imported needs a new interpreter (`commands.process`).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers.places import ROOT

MAIN = str(ROOT / "main.py")
_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["helpers.preloaded"])


class Forked:
    """A program that runs: a file and its arguments, or `-c` and code. Its streams go to files, or to `terminal`."""

    def __init__(self, argv: Sequence[str], cwd: Path = ROOT, terminal: str | None = None, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [terminal or str(Path(self._folder.name, name)) for name in ("out", "err")]
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        with patch.dict(os.environ, {"PYTHONPATH": paths}):
            forkserver.ensure_running()
        whole = {**os.environ, "PYTHONPATH": paths, **environment}
        self._argv = list(argv)
        self._process = _CONTEXT.Process(target=_program, args=(self._argv, str(cwd), whole, *self._streams))
        with (
            patch.object(sys.modules["__main__"], "__spec__", None),
            patch.object(sys.modules["__main__"], "__file__", None, create=True),
        ):  # or each process would import pytest's own program first
            self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Minus a signal's number: the signal ended it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def said(self) -> tuple[str, str]:
        """What its output and its error streams hold by now."""
        out, err = (Path(each).read_text() if Path(each).is_file() else "" for each in self._streams)
        return out, err

    def wait(self, timeout: float | None = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end. After `timeout` seconds it is killed, and TimeoutExpired raised."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._argv, timeout or 0)
        out, err = self.said()
        self._folder.cleanup()
        code = self.poll()
        assert code is not None
        return subprocess.CompletedProcess(self._argv, code, out, err)


def forked(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `main.py` in a forked process."""
    return Forked([MAIN, *arguments], cwd, **environment).wait()


def two_ranks(*argv: str, cwd: Path = ROOT) -> list[Forked]:
    """Start a program in two processes that share a run, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [Forked(argv, cwd, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]


def ended_together(processes: Sequence[Forked]) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all. When one fails the others are killed, as a launcher does."""
    while any(each.poll() is None for each in processes):
        if any(each.poll() for each in processes):
            for each in processes:
                each._process.kill()
        processes[0]._process.join(0.02)
    return [each.wait() for each in processes]


def _program(argv: list[str], cwd: str, environment: Mapping[str, str], out: str, err: str) -> None:
    """Run a program in this process, which was forked for it."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<code>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(argv)
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()

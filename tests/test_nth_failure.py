"""Whatever call of the C library fails, a command says so by name, loses nothing, and goes on when it is given again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FEW = ["generate", "merge", "prune", "safetensors"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("on Linux, install gcc to run this: it compiles tests/nth_failure.c")
    made = tmp_path_factory.mktemp("library") / "nth_failure.so"
    source = ROOT / "tests" / "nth_failure.c"
    subprocess.run(["gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


def repeated(library: Path, folder: Path, n_failures: int, *cases: str) -> None:
    """See `tests/nth_failures.py`, which says what must hold after each failure."""
    done = subprocess.run(
        [sys.executable, "tests/nth_failures.py", str(library), str(folder), str(n_failures), *cases],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" 0 wrong") == len(cases)


def test_some_failures_of_commands_are_named_and_lose_nothing(library: Path, tmp_path: Path) -> None:
    repeated(library, tmp_path, 3, *FEW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*FEW, "index", "hdf5", "npz", "arrow", "transformer_lens", "benchmark", "resume", "sweep"]
)
def test_every_failure_of_a_command_is_named_and_loses_nothing(library: Path, tmp_path: Path, case: str) -> None:
    repeated(library, tmp_path, 0, case)

"""Whatever call of the C library fails, it is said by name, nothing is lost, and the same goes on when it is given again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.nth_cases import CASES, STORE
from helpers.nth_failures import WAYS
from helpers.places import ROOT


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("on Linux, install gcc to run this: it compiles tests/helpers/nth_failure.c")
    made = tmp_path_factory.mktemp("library") / "nth_failure.so"
    source = ROOT / "tests" / "helpers" / "nth_failure.c"
    subprocess.run(["gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


def repeated(library: Path, folder: Path, how: str, *cases: str) -> None:
    """See `tests/helpers/nth_failures.py`, which says what must hold after each failure."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.nth_failures", str(library), str(folder), how, *cases],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" 0 wrong") == len(cases)


@pytest.mark.parametrize(
    "cases", [["run/9", "merge/7", "safetensors/7"], ["generate/7", "benchmark/89", "sweep/73"]], ids=["store", "model"]
)
def test_some_failures_are_named_and_lose_nothing(library: Path, tmp_path: Path, cases: list[str]) -> None:
    repeated(library, tmp_path, "turns", *cases)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_every_failure_to_change_something_is_named_and_loses_nothing(
    library: Path, tmp_path: Path, case: str, way: str
) -> None:
    repeated(library, tmp_path, way, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_failures_to_open_are_named_and_lose_nothing(library: Path, tmp_path: Path, case: str) -> None:
    """They are alike: a sample of them."""
    repeated(library, tmp_path, "reads", f"{case}/{7 if case in STORE else 97}")

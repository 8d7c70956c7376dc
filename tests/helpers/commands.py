"""Run `main.py`: in a new process, under a launcher of two processes, or in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

from typer.testing import CliRunner

from AutomaticEval.cli import options
from AutomaticEval.cli.app import app
from helpers.places import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    *(
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ),
]
"""TORCHRUN and ACCELERATE start two processes."""


def environment() -> dict[str, str]:
    """The environment of a new process: this checkout, and no network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def process(
    *arguments: str, cwd: Path, launcher: Sequence[str] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    """Run `main.py` in a new process, as users do."""
    whole = [*launcher, str(ROOT / "main.py"), *arguments]
    return subprocess.run(whole, cwd=cwd, env=environment(), capture_output=True, text=True)


def within(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which is faster: everything is imported already."""
    with chdir(cwd), patch.object(options, "quiet_libraries"):
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

"""Every example runs as it is, and is short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forked import Forked
from helpers.places import ROOT


def test_the_ten_lines_of_the_readme_give_the_numbers_of_its_picture(tmp_path: Path) -> None:
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("embeddings", "layer_")))
    shown = {"embeddings": 0.32, "layer_0": 0.34, "layer_1": 0.50, "layer_2": 0.69, "layer_3": 0.74}
    assert {key: round(float(value), 2) for key, value in found.items()} == shown


EXPECTED = {
    "01_capture.py": "response: 42",
    "02_benchmark_loop.py": "accuracy: 9 of 12",
    "03_read_a_run.py": "layer_1: the kind is found for 45 of 45",
    "04_in_your_own_evaluation.py": "correct=True: 29 questions",
    "05_score_continuations.py": "' green': -6.77 nats over 4 tokens",
    "06_heads.py": "right: 6 of 6; without\n  head 0 of layer 2 1",
    "07_sparse_autoencoder.py": "loss went down: True",
    "08_lens.py": "layer_2 0.69, layer_3 0.74",
}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) < 40
    done = Forked([str(example)], tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert EXPECTED[example.name] in done.stdout

"""benchmarks/gpu.py on the CPU, in its tiny size: every section runs, every number with a target comes out, and what fails is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_sections  # noqa: E402
from gpu_made import Setting, Sides  # noqa: E402
from gpu_targets import SAME_TEXT, TARGETS, Number, judged  # noqa: E402
from helpers.tape import use_tapes  # noqa: E402

from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER  # noqa: E402

TINY = ("--device", "cpu", "--size", "tiny")
SECTIONS = ("truth", "generate", "prompt", "score", "write", "eight", "fingerprint")


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The benchmark, which writes folder/gpu.json and its runs below folder/runs."""
    places = ("--out", str(folder / "gpu.json"), "--folder", str(folder / "runs"))
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments, *TINY, *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )


def found(folder: Path) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return measured


def errors(record: dict[str, Any]) -> dict[str, str]:
    """Side -> its error, of a section."""
    return {line.get("side", line.get("way", "")): line["error"] for line in record["lines"] if "error" in line}


def test_every_section_gives_all_its_numbers(tmp_path: Path) -> None:
    process = started(tmp_path)
    printed, _ = process.communicate(timeout=900)
    measured = found(tmp_path)
    assert tuple(measured["sections"]) == SECTIONS, printed
    for name, record in measured["sections"].items():
        assert "error" not in record, (name, record["error"])
        assert record["lines"]
        assert record["took"] >= 0  # rounded to tenths of a second
        failed = {side: error for side, error in errors(record).items() if not side.startswith("graph")}
        assert not failed, (name, failed)  # a graph needs a GPU
    owed = {name for name in TARGETS if "graph" not in name}
    given = {line["number"] for line in measured["targets"] if line["measured"] is not None}
    assert given == owed
    assert [line["number"] for line in measured["targets"]] == list(TARGETS)  # those that lack are listed, too
    truth = next(line for line in measured["targets"] if line["number"].startswith("truth: tensors"))
    assert truth["holds"]
    assert all(name in printed for name in TARGETS)
    assert os.listdir(tmp_path / "runs") == []


def test_graphs_give_their_numbers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tapes in place of a GPU's graphs."""
    use_tapes(monkeypatch)
    setting = Setting("cpu", str(DEMO_FOLDER), tmp_path, None, True)
    record: dict[str, Any] = {}
    gpu.run("generate", setting, record, lambda: None)
    assert "error" not in record, record
    assert not errors(record)
    assert set(record["numbers"]) == {name for name, target in TARGETS.items() if target.section == "generate"}
    graphed = list(gpu_sections._graphed(setting, setting.loaded, 6))
    assert Number(SAME_TEXT, 1) in graphed
    compared = next(each for each in graphed if isinstance(each, dict))
    assert compared["equal to another run's"] == compared["tensors"] > 0
    assert compared["off by, of the largest"] < 0.02  # bfloat16, 3 layers


def test_a_section_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    process = started(tmp_path, "score", "fingerprint", "--mmlu", str(tmp_path / "absent"))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    sections = found(tmp_path)["sections"]
    assert sections["score"]["error"]
    assert f"score failed: {sections['score']['error']}" in printed
    assert "error" not in sections["fingerprint"]
    assert len(sections["fingerprint"]["lines"]) == 3


def test_an_interrupt_ends_it_and_keeps_what_was_measured(tmp_path: Path) -> None:
    process = started(
        tmp_path, "fingerprint", "generate", "prompt", "score"
    )  # the rest, so that it is not done before the signal comes
    until = time.monotonic() + 300
    while not (tmp_path / "gpu.json").exists() or "generate" not in found(tmp_path)["sections"]:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    sections = found(tmp_path)["sections"]
    assert len(sections["fingerprint"]["lines"]) == 3
    *before, last = sections
    assert "fingerprint" in before
    assert sections[last]["error"] == "interrupted"
    assert f"{last} failed: interrupted" in printed
    assert os.listdir(tmp_path / "runs") == []


def test_a_new_process_keeps_what_an_earlier_one_measured(tmp_path: Path) -> None:
    """As when a GPU is lost in the middle of a run."""
    before = {"lines": [{"forwards": 1008}], "numbers": {"truth: forwards compared": 1008}, "took": 1, "share": 40}
    process = started(tmp_path, "fingerprint", "--after", json.dumps({"truth": before}))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    measured = found(tmp_path)
    assert measured["sections"]["truth"] == before
    assert {"number": "truth: forwards compared", "measured": 1008, "target": ">= 1000", "holds": True} in measured[
        "targets"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cpu"), "on a CPU this would take hours; give --size tiny"),
        (("generatte",), "no section generatte"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit):
        gpu.arguments()
    assert said in capsys.readouterr().err


def test_a_side_without_time_is_left_out() -> None:
    ran: list[str] = []

    def clock(name: str, seconds: float) -> float:
        ran.append(name)
        time.sleep(seconds)
        return seconds

    clocks = {
        "quick": lambda: clock("quick", 0.01),
        "slow": lambda: clock("slow", 0.3),
        "late": lambda: clock("late", 0),
    }
    sides = Sides(clocks, time.perf_counter() + 0.2).run(3)
    assert ran == ["quick", "slow"]
    assert sides.ratio("slow", "quick") == 30
    assert sides.ratio("late", "quick") is None
    assert sides.line("late", "quick") == {"side": "late", "error": "not measured: the time of the section was over"}


def test_a_side_that_fails_is_left_out() -> None:
    def fails() -> float:
        raise RuntimeError("no kernel\nand more")

    sides = Sides({"fails": fails, "works": lambda: 2.0}, float("inf")).run(2)
    assert sides.line("fails", "works") == {"side": "fails", "error": "RuntimeError: no kernel"}
    assert sides.line("works", "works")["rounds"] == 2
    assert sides.ratio("works", "fails") is None


def test_numbers_are_compared_with_their_targets() -> None:
    numbers = {"score: tree / plain": 0.12, "score: tree / floor": 1.31}
    judgement = {line["number"]: line["holds"] for line in judged({"score": {"numbers": numbers}})}
    assert judgement["score: tree / plain"] is True
    assert judgement["score: tree / floor"] is False
    assert judgement["score: positions=scored / plain"] is None
    assert all(name.startswith("score") for name in judgement)

"""One run shared by two processes over gloo, as launchers start them: what one process gives, to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import ACCELERATE, TORCHRUN, process
from helpers.forked import MAIN, ended_together, forked, two_ranks
from helpers.places import ROOT

from AutomaticEval import open_run
from AutomaticEval.processes import Ranks, join_ranks
from AutomaticEval.store.run import Run


def shared(folder: Path, *options: str) -> list[subprocess.CompletedProcess[str]]:
    """A run of two processes that no launcher started."""
    return ended_together(two_ranks(MAIN, *options, "--activation_save_dir", str(folder)))


def alone(folder: Path, *options: str) -> Path:
    """The same run of one process. Returns `folder`."""
    done = forked(*options, "--activation_save_dir", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def made_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Run]:
    """lm-eval's results, its samples, and the run of the only run folder there."""
    (made,) = folder.iterdir()
    (results,) = made.rglob("results_*.json")
    samples = {
        path.name.rsplit("_", 1)[0]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in made.rglob("samples_*.jsonl")
    }
    return json.loads(results.read_text())["results"], samples, open_run(made)


@pytest.fixture(scope="module")
def asked(own_tasks: str) -> list[str]:
    """Random few-shot examples, windows, duplicates; a question fewer than processes in one task; a number that is odd."""
    given = ["--capture_activations", "--benchmark", "demo,pages,twice,greedy", "--include_path", own_tasks]
    return [*given, "--num_fewshot", "1", "--limit", "7", "--batch_size", "4", "--positions", "all"]


@pytest.fixture(scope="module")
def one(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(tmp_path_factory.mktemp("one"), *asked)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_what_one_gives(launcher: list[str], asked: list[str], one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    printed = process(*asked, "--activation_save_dir", str(two), cwd=ROOT, launcher=launcher)
    assert printed.returncode == 0, printed.stderr[-8000:]
    assert printed.stdout.count("Activations:") == 1  # the first process alone says so
    assert printed.stderr.count("Run folder:") == 1
    (results, samples, expected), (shared_results, shared_samples, made) = made_in(one), made_in(two)
    assert shared_results == results
    assert shared_samples == samples
    assert made.finished
    assert len(made) == len(expected)
    for first, second in zip(expected, made, strict=True):
        for name in ("task", "doc_id", "choice", "repeat", "window", "response", "correct"):
            assert first[name] == second[name]
        for key, rows in first["activations"].items():
            torch.testing.assert_close(
                rows, second["activations"][key], atol=1e-6, rtol=1e-6
            )  # threads round otherwise


def test_both_processes_work_and_sample_differently(own_tasks: str, tmp_path: Path) -> None:
    """Shards of both ranks: even and odd numbers. Equal prompts in both are not answered alike."""
    script = tmp_path / "shared.py"
    script.write_text(
        "import json, sys\n"
        "from AutomaticEval import evaluate_with_activations\n"
        "from AutomaticEval.store.writing import small_shards\n"
        "from AutomaticEval.capture.tree import shared_prompt as prefill\n"
        "small_shards.SMALL, prefill.CHUNK = 0, 8\n"
        f"how = dict(include_path={own_tasks!r}, activation_save_dir={str(tmp_path / 'out')!r}, batch_size=1)\n"
        "outcome = evaluate_with_activations('demo', 'often', repeats=4, gen_kwargs='temperature=3.0', **how)\n"
        "assert bool(outcome.scores) == (outcome.folder is not None and bool(outcome.samples))\n"
    )
    for done in ended_together(two_ranks(str(script))):
        assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out").iterdir()
    numbers = {int(path.stem[6:]) % 2 for path in folder.glob("shard-*.h5")}
    assert numbers == {0, 1}
    table = open_run(folder).table()
    assert len(table) == 12
    answers = table[table.doc_id == 0].response.tolist()
    assert answers[0] != answers[1]  # the first of each rank: with the same random state they would be the same


def test_shared_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Every process killed at once, as by a batch system; resumed by two, and the result is one process's."""
    asked = ["--capture_activations", "--benchmark", "demo", "--limit", "40", "--batch_size", "2", "--positions", "all"]
    script = "from AutomaticEval.store import writer; writer.SHARD_SECONDS = 0.05\nfrom AutomaticEval.cli.app import main; main()"
    processes = two_ranks("-c", script, *asked, "--activation_save_dir", str(tmp_path / "two"))
    while len(list((tmp_path / "two").glob("*/shard-*.h5"))) < 6:
        assert all(each.poll() is None for each in processes)
        time.sleep(0.005)
    for each in processes:
        each.send_signal(signal.SIGKILL)
    assert [done.returncode for done in ended_together(processes)] == [-signal.SIGKILL] * 2
    (folder,) = (tmp_path / "two").iterdir()
    assert not open_run(folder).finished
    refused = shared(tmp_path / "two", *asked, "--resume", str(folder), "--num_fewshot", "1")
    assert any(done.returncode for done in refused)
    assert any("benchmark.num_fewshot was None and is 1" in done.stderr for done in refused)
    for done in shared(tmp_path / "two", *asked, "--resume", str(folder)):
        assert done.returncode == 0, done.stderr
    alone(tmp_path / "one", *asked)
    assert made_in(tmp_path / "two")[0] == made_in(tmp_path / "one")[0]
    table = open_run(folder).table()
    assert len(table) == 200
    assert not table.duplicated(["task", "doc_id", "choice"]).any()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the threads in /proc, which Linux has")
def test_no_thread_of_gloo_outlives_the_group(tmp_path: Path) -> None:
    """One that does gives tensors back while the interpreter ends, and the process dies of SIGABRT, now and then."""
    script = tmp_path / "leaving.py"
    script.write_text(
        "from pathlib import Path\n"
        "from AutomaticEval import processes as ranks\n"
        "from AutomaticEval.models.loading import load_model\n"
        "threads = lambda: [path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]\n"
        "joined = ranks.join_ranks()\n"
        "load_model('demo')  # imports much of torch, as runs do\n"
        "assert joined.gathered(joined.rank) == [0, 1]\n"
        "assert any('gloo' in name for name in threads())\n"
        "ranks._leave()\n"
        "assert not any('gloo' in name for name in threads()), threads()\n"
    )
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()[-4000:]


def test_one_process_is_alone() -> None:
    ranks = join_ranks()
    assert ranks == Ranks()
    assert ranks.gathered(3) == [3]
    assert ranks.from_first("x") == "x"

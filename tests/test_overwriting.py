"""A notebook cell, or a command, that is run twice: what is there is refused, replaced, or left with the new one beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from helpers.commands import within

from AutomaticEval import FromHuggingFace, evaluate_with_activations, open_run
from AutomaticEval.errors import AutomaticEvalError, FolderInUse, PathExists, SelectionError, StoreError
from AutomaticEval.store.writing.earlier_run import new_run_folder
from AutomaticEval.store.writing.folder_lock import locked

TEXTS = ["Paris is the capital of France.", "One and two."]


def features(folder: Path, **how: Any) -> Any:
    return FromHuggingFace("demo", 1, TEXTS[: how.pop("n", 2)], save_features=folder, **how).extract_features()


def evaluation(folder: Path, **how: Any) -> Any:
    how = {"limit": how.pop("n", 2), "layers_to_capture": 0, **how}
    return evaluate_with_activations("demo", "demo_facts", output=folder, **how)


@pytest.mark.parametrize("cell", [features, evaluation])
def test_a_cell_that_is_run_twice(cell: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "gpt2-v1.5"
    cell(folder)
    first = open_run(folder)
    offered = (
        'holds a run, which open_run reads; name a new folder, or pass overwrite=True (--overwrite), or overwrite="version", '
        "which writes gpt2-v1.5-2 (--overwrite version)"
    )
    with pytest.raises(PathExists, match=re.escape(offered)):
        cell(folder)
    cell(folder, overwrite="version", n=1)
    assert 0 < len(open_run(tmp_path / "gpt2-v1.5-2")) < len(first)
    assert len(open_run(folder)) == len(first)
    cell(folder, overwrite=True, n=1)
    assert len(open_run(folder)) == len(open_run(tmp_path / "gpt2-v1.5-2"))
    assert len(list(folder.rglob("results_*.json"))) == (cell is evaluation)
    with pytest.raises(SelectionError, match=r"overwrite is 'yes'; write True, False or \"version\""):
        cell(folder, overwrite="yes")


def test_a_command_that_is_run_twice(tmp_path: Path) -> None:
    asked = ("--capture_activations", "--layers", "0", "--limit", "1")
    assert within(*asked, "-o", "run", cwd=tmp_path).returncode == 0
    again = within(*asked, "-o", "run", cwd=tmp_path)
    assert again.returncode == 2
    assert "--overwrite version" in again.stderr
    assert within(*asked, "-o", "run", "--overwrite", "version", cwd=tmp_path).returncode == 0
    assert within(*asked, "--overwrite", "-o", "run", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]
    alone = within(*asked, "--overwrite", cwd=tmp_path)
    assert "no output is named that it could replace" in alone.stderr


def test_a_file_of_generate_that_is_written_twice(tmp_path: Path) -> None:
    asked = ("generate", "--max_new_tokens", "2", "-o", "x.h5")
    for said, behind in (("Hi", ()), ("Hi", ("--overwrite", "version")), ("Ho", ("--overwrite=version",))):
        assert within(*asked, said, *behind, cwd=tmp_path).returncode == 0
    for before in (("--overwrite", "Ha"), ("--overwrite", "true", "Ha"), ("--overwrite", "--", "Ha")):
        assert within(*asked, *before, cwd=tmp_path).returncode == 0  # a prompt is no value of it
    assert within(*asked, "--overwrite", "false", "Ha", cwd=tmp_path).returncode == 2
    found = {path.stem: open_run(path)[0]["prompt"] for path in tmp_path.iterdir()}
    assert {name: "Ha" in text for name, text in found.items()} == {"x": True, "x-2": False, "x-3": False}


def test_what_is_no_run_of_ours_is_never_replaced(tmp_path: Path) -> None:
    def refused(folder: Path, says: str) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for door in (new_run_folder, features, evaluation):
            with pytest.raises(PathExists, match=says):
                door(folder, overwrite=True)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    run = tmp_path / "run"
    features(run)
    for name in ("notes.txt", "shard-1.txt", "own/results.txt", "plots/a.png"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
        refused(run, rf"holds {Path(name).parts[0]}, which is no part of a run")
        (run / name).unlink()
    (tmp_path / "other").mkdir()
    with h5py.File(tmp_path / "other" / "run.h5", "w") as file:
        file["mine"] = 1.0
    refused(tmp_path / "other", r"holds run\.h5, which is no part of a run")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results_1.json").write_text("{}")
    refused(tmp_path / "results", "no part of a run")
    with pytest.raises(PathExists, match="is a file; name a folder"):
        evaluation(tmp_path / "other" / "run.h5", overwrite=True)


def test_runs_that_are_not_finished_and_damaged_ones(tmp_path: Path) -> None:
    run = tmp_path / "run"
    features(run)
    (run / "run.h5").unlink()  # as if it had been killed
    with pytest.raises(PathExists, match=r"was cut short; go on in it with resume \(--resume\); name a new folder"):
        evaluation(run)
    assert len(features(run)) > 0  # features go on
    lock = locked(run)
    with pytest.raises(FolderInUse):
        new_run_folder(run, overwrite=True)
    lock.release()
    content = bytearray((run / "run.h5").read_bytes())
    content[len(content) // 2 :] = b""
    (run / "run.h5").write_bytes(content)
    assert new_run_folder(run, overwrite=True) == run
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert new_run_folder(run) == run
    with pytest.raises(StoreError, match="no output is named"):
        evaluate_with_activations("no-such-model", "demo", overwrite=True)
    assert issubclass(PathExists, AutomaticEvalError)

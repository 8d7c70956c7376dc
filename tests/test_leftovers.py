"""Results are there whole or not at all, and what a killed process left is in nobody's way. Real full files, real kills."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import ROOT
from helpers.samples import SETTINGS, make_sample

from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
from AutomaticEval.errors import DiskFull, FolderInUse, StoreError
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.results.captured_run import RunFolder
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.processes import Ranks
from AutomaticEval.report.figures import save_with_figures
from AutomaticEval.settings import RunSettings
from AutomaticEval.store.disk.json_files import read_json, write_json
from AutomaticEval.store.disk.partial_folders import clear_leftovers
from AutomaticEval.store.disk.read_back import read_back
from AutomaticEval.store.disk.whole_files import new_file, new_files, new_folder, prepare_folder
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.run_folder import holds_nothing, leaving_nothing
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from AutomaticEval.store.writer import RunWriter

STRENGTH = {
    "kind": "strength",
    "model": "m",
    "of": "result",
    "heads": [{"layer": layer, "head": head, "R_h": layer + head, "n": 3} for layer in range(4) for head in range(4)],
}


def limited(*arguments: str, cwd: Path, most_bytes: int) -> subprocess.CompletedProcess[str]:
    """`main.py` where no file can be larger: what is longer fails with EFBIG, as on a full disk."""
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
    )


def killed_in(work: Callable[[], None]) -> None:
    """Do something in a child that is killed by SIGKILL within it."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_me(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("most_bytes", [4_000, 20_000, 60_000])
def test_lm_evals_files_that_do_not_fit_fail_the_command_by_name(tmp_path: Path, most_bytes: int) -> None:
    done = limited("--benchmark", "demo", "--output_path", "out", cwd=tmp_path, most_bytes=most_bytes)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("DiskFull: the disk is full: lm-eval could not write out/demo/")
    assert "samples_demo_facts" in last
    assert "demo_facts, acc: 0.7444" in done.stderr  # what was computed is told
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_task_whose_name_is_no_file_name_keeps_its_samples(demo: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"q": "Q", "c": ["a", "b"], "a": 0}\n' * 3)
    names = ("a/b", "a-b", "../x")
    for number, name in enumerate(names):
        (tmp_path / f"{number}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\n"
            "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc}]\n"
        )
    asked = Benchmark(names, include_path=(str(tmp_path),))
    outcome = run_benchmark(demo, asked, output_path=tmp_path / "out")
    assert outcome.results_file is not None
    files = sorted(outcome.results_file.parent.iterdir())
    assert len(files) == 4
    assert [file.name.startswith("samples_") for file in files].count(True) == 3
    assert any(file.name.startswith("samples_a-b_") for file in files)
    for file in files[1:]:
        assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3


def test_samples_that_lm_eval_loses_are_an_error(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason is: here a lone surrogate, which lm-eval cannot write."""
    from AutomaticEval.evaluation import run

    evaluate = run.simple_evaluate

    def with_surrogate(**given: Any) -> Any:
        found = evaluate(**given)
        found["samples"]["demo_facts"][1]["doc"]["question"] = "\ud800"
        return found

    monkeypatch.setattr(run, "simple_evaluate", with_surrogate)
    with pytest.raises(StoreError, match=r"could not write .*samples_demo_facts_.*UnicodeEncodeError.*"):
        run_benchmark(demo, Benchmark(("demo_facts",), limit=3), output_path=tmp_path / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_command_whose_figures_met_a_full_disk_can_be_given_again(tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text('["What is red?", "The bus"]')
    command = ("heads", "strength", "--data_path", "texts.json")
    done = limited(*command, cwd=tmp_path, most_bytes=12_000)
    assert done.returncode == 2, done.stderr
    assert "head_strength" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "results").exists()
    done = limited(*command, cwd=tmp_path, most_bytes=10**8)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["head_strength.json", "head_strength.png"]


def test_files_that_appear_together_are_cleared_when_the_command_was_killed_between_them(tmp_path: Path) -> None:
    def killed() -> None:
        link = os.link
        os.link = lambda *names: kill_me() if names[1] == tmp_path / "head_strength.png" else link(*names)  # type: ignore[assignment]
        save_with_figures(tmp_path / "head_strength.json", STRENGTH)

    (tmp_path / "theirs.json").write_text("{}")
    killed_in(killed)
    assert len(list(tmp_path.iterdir())) == 3
    prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.json"]
    assert len(save_with_figures(tmp_path / "head_strength.json", STRENGTH)) == 2


def test_a_whole_file_stays_when_its_writer_was_killed_after_naming_it(tmp_path: Path) -> None:
    def killed() -> None:
        link = os.link
        os.link = lambda *names: (link(*names), kill_me())  # type: ignore[assignment]
        write_json(tmp_path / "a.json", {"a": 1})

    killed_in(killed)
    assert len(list(tmp_path.iterdir())) == 2
    prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("to", ["npz", "safetensors", "transformer_lens"])
def test_a_killed_export_does_not_stop_a_resume(tmp_path: Path, to: str) -> None:
    settings = {**SETTINGS, "shape": {"n_heads": 4, "n_kv_heads": 2}}
    with RunWriter(tmp_path / "run", "m", settings) as writer:
        writer.add([make_sample()])
    killed_in(lambda: export(tmp_path / "run", tmp_path / "run" / "out", to, advance=kill_me) and None)
    (tmp_path / "run" / f".old.{7:032x}.partial").mkdir()  # as the first versions left them
    (tmp_path / "run" / f".old.h5.{7:032x}.partial").touch()
    (tmp_path / "run" / ".theirs.partial").touch()
    with RunWriter(tmp_path / "run", "m", settings, resume=True) as writer:
        assert writer.n_samples == 1
        writer.finish()
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == [".lock", ".theirs.partial", "run.h5", "shard-00000.h5"]


def test_a_run_whose_index_is_built_again_is_cleared_of_leftovers(tmp_path: Path) -> None:
    def killed() -> None:
        with new_file(tmp_path / "x.json") as partial:
            partial.write_text("{}")
            kill_me()

    with RunWriter(tmp_path, "m", SETTINGS) as writer:
        writer.add([make_sample()])
        writer.finish()
    killed_in(killed)
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    rebuild_index(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.h5", "shard-00000.h5"]


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from AutomaticEval.store.disk.whole_files import new_file\n"
        "with new_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('{}'); print('begun', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        clear_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        other.communicate("")
    assert other.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"a": 1'),
        ("a.json", ""),
        ("a.jsonl", '{"a": 1}\n{"a"'),
        ("a.png", "\x89PNG"),
        ("a.json", "[" * 9**6),
    ],
)
def test_what_was_not_written_whole_gets_no_name(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(StoreError, match=f"{name} was not written whole"), new_file(tmp_path / name) as partial:
        partial.write_text(text)
    with pytest.raises(StoreError, match="not written whole"), new_folder(tmp_path / "folder") as made:
        (made / name).write_text(text)
    with pytest.raises(StoreError, match="not written whole"), new_files(tmp_path, "set") as made:
        _write(made, {"0.json": "{}", name: text})
    assert list(tmp_path.iterdir()) == []


def _write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text)


def test_files_that_appear_together_replace_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("theirs")
    with pytest.raises(StoreError, match=r"b\.json exists"), new_files(tmp_path, "set") as made:
        _write(made, {"a.json": "{}", "b.json": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert (tmp_path / "b.json").read_text() == "theirs"


def test_figures_are_read_back(tmp_path: Path) -> None:
    _, figure = save_with_figures(tmp_path / "head_strength.json", STRENGTH)
    read_back(figure)
    figure.write_bytes(figure.read_bytes()[:-1])
    with pytest.raises(StoreError, match="no whole PNG"):
        read_back(figure)


def test_locks_of_a_shared_run_go_when_it_is_finished(tmp_path: Path) -> None:
    RunWriter(tmp_path, "m", SETTINGS, share=(0, 2)).close()
    with RunWriter(tmp_path, "m", SETTINGS, share=(1, 2)) as second:
        second.add([make_sample()])
        (tmp_path / ".lock-theirs").touch()
        with pytest.raises(FolderInUse):
            RunWriter(tmp_path, "m", SETTINGS, resume=True)
        assert (tmp_path / ".lock-1").exists()
    with RunWriter(tmp_path, "m", {**SETTINGS, "run_id": second.run_id}, resume=True) as alone:
        alone.finish()
    assert sorted(path.name for path in tmp_path.glob(".lock*")) == [".lock", ".lock-theirs"]


def test_a_run_that_fails_before_its_first_rows_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(RunOutput(tmp_path), "run", "m", RunSettings.from_dict(SETTINGS), 10**6, Ranks())
    with pytest.raises(DiskFull), folder.writing():
        raise DiskFull("no room")
    assert list(tmp_path.iterdir()) == []

    def kept_from_going(path: Path, missing_ok: bool = False) -> None:
        if ".partial" in path.name and path.parent != tmp_path and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, missing_ok)

    failed: list[Path] = []
    unlink = Path.unlink
    with monkeypatch.context() as patch:  # the folder is there, and cannot be opened
        patch.setattr(Path, "unlink", kept_from_going)
        with pytest.raises(StoreError, match="not written"), folder.writing():
            raise AssertionError("it was opened")
    assert failed
    assert list(tmp_path.iterdir()) == []

    def fail(writer: RunWriter) -> None:
        writer.add([make_sample()])
        raise DiskFull("no room")

    with pytest.raises(DiskFull), folder.writing() as opened:
        fail(opened.writer)
    (kept,) = tmp_path.iterdir()
    assert len(open_run(kept)) == 1


class Counting:
    """A sweep of three places and two sequences."""

    def layer(self, layer: int) -> torch.Tensor:
        found = torch.arange(6.0).view(3, 2) + layer
        return found.masked_fill(found == 4, torch.nan)


def test_a_layer_of_a_sweep_is_read_back_as_it_was(tmp_path: Path) -> None:
    folder, sweep = SweepFolder(tmp_path, {}), Counting()
    first = folder.layers("logprobs", range(3), sweep.layer)
    assert torch.equal(first.nan_to_num(-1), folder.layers("logprobs", range(3), sweep.layer).nan_to_num(-1))
    file = tmp_path / "logprobs_layer_001.json"
    older = read_json(file)
    del older["xxh3_64"]
    file.write_text(json.dumps(older))  # as the first versions wrote them
    assert torch.equal(first.nan_to_num(-1), folder.layers("logprobs", range(3), sweep.layer).nan_to_num(-1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:20],
        lambda text: "",
        lambda text: "{}",
        lambda text: '{"logprobs": null}',
        lambda text: '{"logprobs": 3}',
        lambda text: '{"logprobs": [1.0, 2.0]}',
        lambda text: '{"logprobs": [[1.0]]}',
        lambda text: '{"logprobs": [[1.0], [1.0, 2.0]]}',
        lambda text: '{"logprobs": [["a", "b"], ["a", "b"], ["a", "b"]]}',
        lambda text: '{"logprobs":' + "[" * 5000 + "]" * 5000 + "}",
        lambda text: '{"logprobs": [[' + "9" * 400 + "]]}",
        lambda text: text.replace("2.0", "2.5", 1),
    ],
)
def test_a_damaged_layer_of_a_sweep_is_named(tmp_path: Path, damage: Callable[[str], str]) -> None:
    folder, sweep = SweepFolder(tmp_path, {}), Counting()
    folder.layers("logprobs", range(3), sweep.layer)
    file = tmp_path / "logprobs_layer_001.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(StoreError, match=r"logprobs_layer_001\.json"):
        folder.layers("logprobs", range(3), sweep.layer)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failure_after_a_file_got_its_name_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    sync, path = os.fsync, tmp_path / "a.json"

    def no_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        sync(handle)

    def write(text: str, *, overwrite: bool) -> None:
        with new_file(path, overwrite=overwrite) as partial:
            partial.write_text(text)

    monkeypatch.setattr(os, "fsync", no_folders)
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"was not written.*, and nothing of it was left behind"):
            write("{}", overwrite=overwrite)
        assert list(tmp_path.iterdir()) == []
    path.write_text("[]")
    with pytest.raises(StoreError, match=r"a\.json took the place of the one before and is whole, but") as told:
        write("{}", overwrite=True)
    assert path.read_text() == "{}"
    assert "left behind" not in str(told.value)
    assert isinstance(told.value, DiskFull) == (code == errno.ENOSPC)


def test_a_folder_is_taken_back_also_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has its name, nothing that needs room can be done: neither a sync of the folder around it nor another name."""
    sync, rename, path = os.fsync, Path.rename, tmp_path / "x"

    def full(*given: Any) -> Any:
        if path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return (sync if len(given) == 1 else rename)(*given)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "rename", lambda *given: full(*given))
    with pytest.raises(DiskFull, match="nothing of it was left behind"), new_folder(path) as made:
        (made / "a.json").write_text("{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["download.partial", ".lock-notes", ".x.partial", "notes.txt"])
def test_a_folder_with_files_of_others_is_not_taken_for_an_empty_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / ".lock").touch()
    assert not holds_nothing(tmp_path)
    with pytest.raises(StoreError), leaving_nothing(tmp_path):
        raise StoreError("it fails before its first shard")
    assert (tmp_path / name).read_text() == "mine"

"""The command line as people use it: real processes, what they print, how they end, what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import pytest
import typer
from helpers.commands import process
from helpers.forked import Forked, forked
from helpers.places import ROOT
from tqdm import tqdm

from AutomaticEval import load_activations, open_run
from AutomaticEval.cli.app import app
from AutomaticEval.cli.options import command
from AutomaticEval.errors import StoreError

main = partial(forked, HF_DATASETS_OFFLINE="1")


@pytest.fixture
def main_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`main` in this process: for a look at many mistakes, each of which need not load the libraries again."""

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            app()
        code = ended.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(list(arguments), code, *capsys.readouterr())

    return run


def test_the_readmes_run(tmp_path: Path) -> None:
    """From a new interpreter: what libraries say while they are imported would be seen, too."""
    done = process("--capture_activations", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.7444" in done.stdout
    assert "180 of 180" in done.stdout
    (folder,) = (tmp_path / "activations").iterdir()
    assert f"open_run('activations/{folder.name}')" in done.stdout
    run = open_run(folder)
    assert f"{len(run)} samples" in done.stdout
    assert "at most" in done.stderr
    assert "request/s" in done.stderr
    shown = main("show", str(folder), cwd=tmp_path)
    assert "demo_facts" in shown.stdout
    assert "0.7444" in shown.stdout
    one = main("show", str(folder), "--sample", "0", cwd=tmp_path)
    assert "layer_3" in one.stdout
    assert main("show", str(folder), "--sample", "450", cwd=tmp_path).returncode == 2


def test_both_spellings_and_every_option(tmp_path: Path) -> None:
    done = main(
        *("--capture-activations", "--benchmark", "demo", "--model", "demo", "--num-trials", "6", "--num_fewshot", "1"),
        *("--layers", "-1", "--sites", "embed,resid_post,z", "--positions", "last", "--activation-save-dir", "kept"),
        *("--batch-size", "3", "--seed", "5", "--dtype", "bfloat16", "--device", "cpu", "--output-path", "results"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "6 of 180" in done.stdout
    (folder,) = (tmp_path / "kept").iterdir()
    run = open_run(folder)
    assert run.keys == ["embeddings", "layer_3", "layer_3.z"]
    assert run.settings["dtype"] == "bfloat16"
    assert run.settings["benchmark"]["num_fewshot"] == 1
    assert run.settings["benchmark"]["seed"] == 5
    assert all(len(sample["token_ids"]) == 1 for sample in run)
    assert list((tmp_path / "results").rglob("results_*.json"))
    assert not list(folder.rglob("results_*.json"))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_run(tmp_path: Path, bits: str) -> None:
    done = main("--capture_activations", f"--load_in_{bits}", "--limit", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "activations").iterdir()
    assert open_run(folder).settings["quantization"] == bits


def test_generate_prints_the_response_and_saves_on_request(tmp_path: Path) -> None:
    prompt = "Question: What is 12 + 30?\nAnswer:"
    done = main("generate", prompt, "--max_new_tokens", "8", cwd=tmp_path)
    assert done.stdout.strip() == "42"
    assert os.listdir(tmp_path) == []
    saved = main("generate", prompt, "--max-new-tokens", "8", "--save-path", "x.h5", "--layers", "0", cwd=tmp_path)
    assert saved.stdout == done.stdout
    assert "x.h5" in saved.stderr
    assert list(load_activations(tmp_path / "x.h5")["activations"]) == ["embeddings", "layer_0"]
    shown = main("show", "x.h5", cwd=tmp_path)
    for text in ("What is 12 + 30?", "response:  42", "layer_0", "19x128", "Mean norm"):
        assert text in shown.stdout
    again = main("generate", prompt, "--save_path", "x.h5", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert main("generate", prompt, "--capture_activations", cwd=tmp_path).returncode == 0
    (named,) = (tmp_path / "activations").iterdir()
    assert named.name.startswith("generation_")


STOPPED = """
import os, signal, sys
from lm_eval.models.huggingface import HFLM
from AutomaticEval.cli.app import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
forward, calls = HFLM._model_call, []
def count(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), getattr(signal, sys.argv.pop()))
    return forward(self, *args, **kwargs)
HFLM._model_call = count
main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_run_that_is_told_to_stop_keeps_what_it_captured(tmp_path: Path, name: str) -> None:
    how = ["--capture_activations", "--benchmark", "demo_facts", "--scoring", "stock"]
    script = STOPPED.replace("from lm_eval", "stop = sys.argv.pop()\nsys.argv[0] = 'main.py'\nfrom lm_eval", 1)
    done = Forked(["-c", script.replace("sys.argv.pop()))", "stop))"), *how, name], tmp_path).wait()
    assert done.returncode in (130, 143), done.stderr
    assert "cut short" in done.stderr
    (folder,) = (tmp_path / "activations").iterdir()
    run = open_run(folder)
    assert not run.finished
    assert len(run) >= 32
    assert sorted(os.listdir(folder)) == [".lock", "asked.json", "shard-00000.h5"]


def test_sites_lists_widths_and_reasons(tmp_path: Path) -> None:
    done = main("sites", cwd=tmp_path)
    assert "layer_0.mlp_post … layer_3.mlp_post" in done.stdout
    assert "384" in done.stdout


def bad_files(folder: Path) -> None:
    (folder / "text.h5").write_text("hello")
    (folder / "file").touch()
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"] = 1
    generated = main("generate", "Hi", "--save_path", "good.h5", "--max_new_tokens", "2", cwd=folder)
    assert generated.returncode == 0, generated.stderr
    whole = (folder / "good.h5").read_bytes()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "newer.h5").write_bytes(whole)
    with h5py.File(folder / "newer.h5", "r+") as file:
        file.attrs["format_version"] = "9.0"


BAD = [
    (["generate", ""], "EmptyPrompt", "empty"),
    (["generate", "a" * 3000], "PromptTooLong", "512"),
    (["generate", "Hi", "--layers", "0"], "SelectionError", "--capture_activations"),
    (["--layers", "0"], "SelectionError", "--capture_activations"),
    (["--positions", "all"], "SelectionError", "--capture_activations"),
    (["generate", "Hi", "--save_path", "x.h5", "--layers", "9"], "UnknownLayer", "4 layers"),
    (["generate", "Hi", "--save_path", "x.h5", "--sites", "resid_past"], "UnknownSite", "resid_post"),
    (["generate", "Hi", "--save_path", "x.h5", "--positions", "somewhere"], "UnknownPositions", "somewhere"),
    (["generate", "Hi", "--save_path", "file/x.h5"], "FolderNotWritable", "file"),
    (["generate", "Hi", "--model", "./nowhere"], "ModelUnavailable", "nowhere"),
    (["generate", "Hi", "--model", "somebody/absent"], "ModelUnavailable", "cannot be reached"),
    (["generate", "Hi", "--device", "cuda:99x"], "DeviceUnavailable", "cuda:99x"),
    (["--benchmark", "dmeo", "--include_path", "."], "UnknownBenchmark", "demo"),
    (["--benchmark", "demo_fact", "--capture_activations"], "UnknownBenchmark", "demo_facts"),
    (["--capture_activations", "--layers", "4"], "UnknownLayer", "4 layers"),
    (["--capture_activations", "--sites", "pattern"], "UnknownSite", "pattern"),
    (["--capture_activations", "--activation_save_dir", "file"], "FolderNotWritable", "file"),
    (["--benchmark", "demo", "--output_path", "file"], "FolderNotWritable", "file"),
    (["--num_trials", "0"], "BenchmarkError", "at least 1"),
    (["--model", "gpt2", "generate", "Hi"], "SelectionError", "--model before the command 'generate'"),
    (["--num-trials=3", "--load_in_8bit", "show", "x.h5"], "SelectionError", "--num_trials, --load_in_8bit before"),
    (["--layers", "0", "heads", "strength"], "SelectionError", "heads … --layers"),
    (["show", "absent.h5"], "StoreError", "absent.h5"),
    (["show", "text.h5"], "NotActivations", "not an HDF5 file"),
    (["show", "other.h5"], "NotActivations", "not ours"),
    (["show", "cut.h5"], "TruncatedFile", "cut.h5"),
    (["show", "newer.h5"], "NewerFormat", "9.0"),
]


def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(
    tmp_path: Path, main_here: Callable[..., Any]
) -> None:
    """Every kind of error once as a process, which the hub's switches need, too."""
    bad_files(tmp_path)
    seen: set[str] = set()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for arguments, name, says in BAD:
        done = (main_here if name in seen - {"ModelUnavailable"} else main)(*arguments, cwd=tmp_path)
        seen.add(name)
        lines = [line for line in done.stderr.splitlines() if line.startswith(name)]
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert len(lines) == 1, (arguments, done.stderr)
        assert says in lines[0], (arguments, lines)
        assert "Traceback" not in done.stderr, arguments
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, arguments


def test_help_and_import_do_not_load_the_heavy_libraries(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['main.py', '--help']\n"
        "import AutomaticEval, AutomaticEval.cli.app\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'h5py', 'pandas', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_option_has_an_underscore_spelling_and_help() -> None:
    from typer.main import get_command

    group = get_command(app)
    commands = [group, *getattr(group, "commands").values()]  # noqa: B009
    names = [name for command in commands for option in command.params for name in option.opts]
    assert "--capture_activations" in names
    assert not [name for name in names if "-" in name.removeprefix("--").removeprefix("-")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--use_cache", "x"], "no forward"),
        (["--cache_requests", "true"], "wrong ones"),
        (["--scoring", "fast"], "tree or stock"),
        (["--resume", "no/such/folder"], "no folder"),
        (["--repeats", "3"], "does not sample"),
        (["--apply_chat_template"], "no chat template"),
        (["--benchmark_data", "no/such/folder"], "no folder"),
    ],
)
def test_what_would_break_a_run_is_refused_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, main_here: Callable[..., Any]
) -> None:
    done = main_here("--capture_activations", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "activations").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--layers", "0", "--capture_activations", "ture"],
            "--capture_activations takes no value, and 'ture' stands behind it",
        ),
        (["--benchmark", "demo_facts", "demo_arithmetic"], "(demo_facts,demo_arithmetic)"),
        (["--benchmark=demo_facts", "mmlu"], "--benchmark takes one value, 'demo_facts', and 'mmlu'"),
        (
            ["--model", "gpt2", "genrate", "Hi"],
            "Did you mean 'generate'? The options of a command stand behind its name.",
        ),
    ],
)
def test_a_word_too_many_is_told_with_the_option_before_it(
    arguments: list[str], says: str, tmp_path: Path, main_here: Callable[..., Any]
) -> None:
    done = main_here(*arguments, cwd=tmp_path)
    told = " ".join(done.stderr.replace("│", " ").split())
    assert (done.returncode, says in told) == (2, True), told
    assert "prune" not in told


@pytest.mark.parametrize(
    ("written", "captures"),
    [
        (["--capture_activations", "true"], True),
        (["--capture-activations=True"], True),
        (["--capture_activations", "FALSE"], False),
        (["--capture_activations=0"], False),
    ],
)
def test_flags_with_a_value_are_understood(
    written: list[str], captures: bool, tmp_path: Path, main_here: Callable[..., Any]
) -> None:
    done = main_here(*written, "--positions", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert ("no positions 'nowhere'" if captures else "nothing is captured") in done.stderr


def test_resume_alone_names_what_is_no_run(tmp_path: Path) -> None:
    done = main("--resume", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no run that was cut short" in done.stderr


def test_every_new_option_reaches_lm_eval(tmp_path: Path) -> None:
    done = main(
        *(
            "--capture_activations",
            "--benchmark",
            "demo_arithmetic",
            "--limit",
            "3",
            "--system_instruction",
            "Be short.",
        ),
        *("--gen_kwargs", "do_sample=true,temperature=0.7", "--repeats", "2", "--predict_only", "--seed", "7"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "activations").iterdir()
    table = open_run(folder).table()
    assert table.groupby("doc_id").repeat.nunique().tolist() == [2, 2, 2]
    assert table.prompt.str.startswith("Be short.").all()


def test_an_error_begins_its_own_line_below_a_bar(capfd: pytest.CaptureFixture[str]) -> None:
    bar = tqdm(total=2)
    bar.update()

    @command
    def fails() -> None:
        raise StoreError("no room")

    with pytest.raises(typer.Exit):
        fails()
    assert capfd.readouterr().err.split("\n")[-2:] == ["StoreError: no room", ""]
    bar.close()

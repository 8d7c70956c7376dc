"""`main.py show RUN`: what a run says of itself, held against what made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import within
from transformers.utils import logging as transformers_logging

from AutomaticEval import Edit, editing, evaluate_with_activations, generate_inference, load_model, open_run
from AutomaticEval.cli import generate as generate_command
from AutomaticEval.errors import StoreError
from AutomaticEval.models.checkpoint import model_weights
from AutomaticEval.store.reading.overview import facts_of, tasks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "run"
    evaluate_with_activations("demo", "demo", limit=7, positions="all", layers_to_capture=[1, 2], output=path)
    return path


def test_show_says_what_a_run_is(folder: Path, tmp_path: Path) -> None:
    said = within("show", str(folder), cwd=tmp_path).stdout
    facts = facts_of(open_run(folder))
    for name, text in facts.items():
        assert name in said
        assert "".join(text.split()) in "".join(said.replace("│", "").split()), name
    assert facts["model"] == "demo (llama, 4 layers of 128, float32, sdpa)"
    assert facts["state"] == "finished"
    assert facts["benchmark"].startswith("demo, limit 7")
    assert (facts["sites"], facts["layers"], facts["positions"], facts["edits"]) == (
        "embed,resid_post",
        "1,2",
        "all",
        "none",
    )
    n_bytes = sum(file.stat().st_size for file in folder.glob("shard-*.h5"))
    run = open_run(folder)
    n_rows = len(run.rows("layer_1"))
    assert facts["size"] == f"{len(run)} samples, {n_rows} rows of 3 sites; {n_bytes / 1024:.1f} KB in 1 file"


def test_the_means_of_a_run_are_lm_evals_scores(folder: Path) -> None:
    (file,) = folder.glob("*/results_*.json")
    scores = json.loads(file.read_text())["results"]
    lines = tasks_of(open_run(folder))
    assert [line.task for line in lines] == ["demo_arithmetic", "demo_facts"]
    for line in lines:
        assert line.n_questions == 7
        assert line.means
        for metric, (mean, error) in line.means.items():
            name = next(each for each in scores[line.task] if each.startswith(f"{metric},"))
            assert mean == pytest.approx(scores[line.task][name])
            assert error == pytest.approx(scores[line.task][name.replace(",", "_stderr,")])
        (mean, _), *_ = line.means.values()
        assert line.correct == pytest.approx(mean)
    assert {line.task: line.n_samples for line in lines} == {"demo_arithmetic": 7, "demo_facts": 28}


def test_a_run_that_is_cut_and_a_single_file_say_so(folder: Path, tmp_path: Path) -> None:
    shard = folder / "shard-00000.h5"
    assert facts_of(open_run(shard))["state"] == "one file"
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / shard.name).write_bytes(shard.read_bytes())
    assert facts_of(open_run(cut))["state"].startswith("not finished")
    assert [line.correct for line in tasks_of(open_run(cut))] == [None, None]


def shown_question(folder: Path, tmp_path: Path, *more: str) -> list[list[str]]:
    """The cells of the lines that the command prints."""
    said = within("show", str(folder), *more, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in said.stdout.splitlines()]


def test_show_a_question_with_its_choices_norms_and_ranks(folder: Path, tmp_path: Path) -> None:
    """Against one plain forward of the prompt, and lm-eval's own log-probabilities."""
    lines = shown_question(folder, tmp_path, "--task", "demo_facts", "--doc", "2", "--lens")
    samples = open_run(folder).where(task="demo_facts", doc_id=2)
    logprobs = torch.tensor(samples.column("logprob"))
    target, prediction = samples.column("target")[0], samples.column("prediction")[0]
    for number, (logprob, probability) in enumerate(zip(logprobs, logprobs.softmax(0), strict=True)):
        mark = ", ".join(name for name, which in (("right", target), ("predicted", prediction)) if which == number)
        text = samples.column("response")[number].strip()
        assert [str(number), text, mark, f"{logprob:.4f}", f"{probability:.4f}"] in lines
    loaded = load_model("demo")
    right = samples[target]
    token = int(right["generated_ids"][0])
    with torch.no_grad():
        out = loaded.model(right["input_ids"], output_hidden_states=True)
        middle = loaded.model.lm_head(loaded.model.model.norm(out.hidden_states[2][0, -1]))
    norm = float(out.hidden_states[2][0, -1].norm())
    assert ["layer_1", f"{norm:.4g}", str(int((middle > middle[token]).sum()) + 1)] in lines
    assert not any("--lens" in cell for line in lines for cell in line)


def test_show_a_generated_answer_and_what_there_is_not(folder: Path, tmp_path: Path) -> None:
    lines = shown_question(folder, tmp_path, "--task", "demo_arithmetic", "--doc", "0")
    (sample,) = open_run(folder).where(task="demo_arithmetic", doc_id=0)
    assert [f"Response: {sample['response']}"] in lines
    assert [f"Correct: {sample['correct']}"] in lines
    for arguments, says in (
        (("--task", "demo_fact", "--doc", "0"), "demo_facts"),
        (("--doc", "0"), "say which with --task: demo_arithmetic, demo_facts"),
        (("--task", "demo_facts", "--doc", "999"), "no document 999 of demo_facts"),
        (("--task", "demo_facts"), "add --doc N"),
        (("--doc", "0", "--sample", "1"), "--sample was given, but --doc shows a question"),
    ):
        done = within("show", str(folder), *arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        assert says in " ".join(done.stderr.split())


def test_show_a_sample_begins_with_what_was_asked_and_answered(folder: Path, tmp_path: Path) -> None:
    said = within("show", str(folder), "--sample", "3", cwd=tmp_path).stdout
    sample = open_run(folder)[3]
    assert said.startswith(f"prompt: {sample['prompt']}\nresponse: {sample['response']}\n")
    assert said.count("prompt: ") == said.count("response: ") == 1
    assert said.index("layer_2") < said.index("settings: ")


def test_the_lens_says_why_a_generated_answer_has_no_rank(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(run: object) -> None:
        pytest.fail("a model was loaded for nothing")

    monkeypatch.setattr("AutomaticEval.cli.show_question._model_of", never)
    done = within("show", str(folder), "--task", "demo_arithmetic", "--doc", "0", "--lens", cwd=tmp_path)
    assert "No ranks: the question was answered with a text" in done.stdout


def test_an_extraction_is_shown_as_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("What is\nA longer text, which is cut here.\n")
    asked = ("--model", "demo", "--texts", "a.txt", "--layers", "0", "--seq_length", "6", "-o", "ex")
    assert within("extract", *asked, cwd=tmp_path).returncode == 0
    run = open_run(tmp_path / "ex")
    cells = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in within("show", "ex", cwd=tmp_path).stdout.splitlines()
    ]
    tokens = sum(len(each["input_ids"][0]) for each in run)
    assert ["a", "2", "2", str(tokens), "1"] in cells
    assert not any("Questions" in cell or "unknown" in cell for line in cells for cell in line)
    assert "2 samples of 2 texts" in run._repr_html_()


def test_edits_are_short_and_taken_apart_as_before(tmp_path: Path) -> None:
    vector = torch.linspace(0, 1, 128)
    with editing("demo", [Edit.add("layer_1", vector), Edit.scale("layer_2", 0.5)]) as model:
        evaluate_with_activations(model, "demo_facts", limit=1, layers_to_capture=0, output=tmp_path / "run")
    edits = open_run(tmp_path / "run").edits()
    (text, value), (other, none) = edits
    assert torch.equal(value, vector.double()[None])
    assert none is None
    assert repr(edits) == f"[<edit: {text}, [1, 128] float64>, <edit: {other}>]"


def test_an_unfinished_run_names_the_command_that_goes_on(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "it is cut"
    cut.mkdir()
    (cut / "shard-00000.h5").write_bytes((folder / "shard-00000.h5").read_bytes())
    with pytest.raises(StoreError, match=r"run\.table\(\), .* It goes on with the command that made it and --resume"):
        open_run(cut).questions()
    (cut / "asked.json").write_text("{}")
    with pytest.raises(StoreError, match=rf"python main\.py --resume '{cut}'$"):
        open_run(cut).questions()


def test_ctrl_c_says_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command.Positions, "parse", stopped)
    done = within("generate", "Hi", "--positions", "last", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (130, "Stopped (Ctrl-C).\n", "")


def test_loading_shows_a_named_bar_only_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    before = transformers_logging._tqdm_hook
    load_model("demo", dtype="float16")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(model_weights, "BAR_SECONDS", 0)
    load_model("demo", dtype="float64")
    assert "Loading demo: " in capfd.readouterr().err
    assert transformers_logging._tqdm_hook is before
    assert generate_inference("Hi", "demo", max_new_tokens=1)

"""`main.py lens` and `main.py geometry`: what a person types, reads and finds on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import within

from AutomaticEval import (
    evaluate_with_activations,
    generate_inference_with_activations,
    geometry,
    load_tuned_lens,
    logit_lens,
    open_run,
    read_lens_questions,
)
from AutomaticEval.errors import DiskFull
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.report import figures


@pytest.fixture(scope="module")
def asked(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo benchmark: facts with four choices, and sums with a generated answer."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    evaluate_with_activations(demo, "demo", limit=20, output=folder)
    return folder


def test_lens_prints_writes_and_draws_what_the_function_gives(asked: Path, tmp_path: Path) -> None:
    done = within(
        "lens", str(asked), "--sites", "resid_post", "--layers", "1-3", "--limit", "30", "-o", "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "lens.json").read_text())
    result = logit_lens(open_run(asked), ["layer_1", "layer_2", "layer_3"], limit=30)
    assert written == json.loads(json.dumps(result.as_json()))
    assert (tmp_path / "out" / "lens.png").stat().st_size > 20_000
    table = read_lens_questions(tmp_path / "out")
    np.testing.assert_array_equal(table["gold_rank"], np.array(result.questions["gold_rank"], float))
    assert len(table) == 3 * 30
    assert f"{written['places'][-1]['choice_accuracy']['mean']:.3f}" in done.stdout
    again = within("lens", str(asked), "-o", "out", cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "out/lens.json exists and is not overwritten" in again.stderr


def test_a_prompt_without_a_right_answer_is_read_too(demo: LoadedModel, tmp_path: Path) -> None:
    """One question has no interval, and gold has no number."""
    generate_inference_with_activations("What is 3 plus 4?", demo, save_path=tmp_path / "gen.h5", max_new_tokens=3)
    done = within("lens", "gen.h5", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "lens.png").exists()
    assert "Logit lens over 1 questions, 1 different prompts" in done.stdout
    told = [" ".join(line.replace("│", " ").split()) for line in done.stdout.splitlines() if "prompts  " in line]
    assert "prompts 0 0 0 0" in told[-1]


def test_one_question_is_read_token_by_token(asked: Path, tmp_path: Path) -> None:
    done = within("lens", str(asked), "--task", "demo_facts", "--doc_id", "3", "-o", "one.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "one.json").read_text())
    last = written["places"][-1]
    assert f"{last['probability'][-1]:.4f}" in done.stdout
    assert (tmp_path / "lens_question.png").stat().st_size > 10_000


def test_a_tuned_lens_is_written_with_its_results_or_not_at_all(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        "lens",
        str(asked),
        "--sites",
        "resid_post",
        "--layers",
        "1",
        "--train_tuned",
        "own.safetensors",
        "--steps",
        "20",
        "-o",
        "out",
    )

    def full(*_: object) -> None:
        raise DiskFull("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(figures, "write_json", full)
        failed = within(*given, cwd=tmp_path)
    assert failed.returncode == 2
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []
    done = within(*given, cwd=tmp_path)  # the same command
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tuned_lens.png").exists()
    assert list(load_tuned_lens(tmp_path / "own.safetensors").places) == ["layer_1"]
    read = within(
        "lens",
        str(asked),
        "--sites",
        "resid_post",
        "--layers",
        "1",
        "--tuned",
        "own.safetensors",
        "-o",
        "out",
        cwd=tmp_path,
    )
    assert read.returncode == 0, read.stderr
    assert "questions that the tuned lens learned from" in read.stdout
    other = within(
        "lens",
        str(asked),
        "--sites",
        "resid_post",
        "--layers",
        "2",
        "--tuned",
        "own.safetensors",
        "-o",
        "new",
        cwd=tmp_path,
    )
    assert "SelectionError: the tuned lens has no map of layer_2; it has layer_1." in other.stderr


def test_geometry_prints_writes_and_draws_what_the_function_gives(asked: Path, tmp_path: Path) -> None:
    options = ("--sites", "resid_post", "--layers", "1-2", "--scatter", "layer_1", "--seed", "7")
    done = within("geometry", str(asked), str(asked), *options, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "geometry.json").read_text())
    run = open_run(asked)
    result = geometry(run, run, ["layer_1", "layer_2"], scatter="layer_1", seed=7)
    assert written == json.loads(json.dumps(result.as_json()))
    for name in ("cka", "cosine"):
        np.testing.assert_allclose(written["between_runs"][name], written["between"][name], atol=1e-6)
    assert "All alike" not in done.stdout
    for name in ("", "_between", "_scatter", "_two_runs"):
        assert (tmp_path / "out" / f"geometry{name}.png").stat().st_size > 10_000
    assert "40 rows of 128 numbers have a rank of 39 at most" in done.stdout


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("lens", ("--layers", "9"), "UnknownLayer: no layer 9"),
        ("lens", ("--sites", "mlp_out"), "SelectionError: "),
        ("lens", ("--position", "somewhere"), "UnknownPositions: no positions 'somewhere'"),
        ("lens", ("--doc_id", "999", "--task", "demo_facts"), "has no document 999 of demo_facts"),
        ("lens", ("--doc_id", "3", "--task", "demo_fact"), "Did you mean 'demo_facts'?"),
        ("lens", ("--tuned", "none.safetensors"), "UnreadableFile: there is no file none.safetensors"),
        ("lens", ("--doc_id", "3"), "has several tasks; say which with --task (task=): demo_arithmetic, demo_facts."),
        ("lens", ("--train_tuned", "own.npy"), "own.npy: a tuned lens is written as .safetensors"),
        ("geometry", ("--layers", "9"), "UnknownLayer: no layer 9"),
        ("geometry", ("--position", "somewhere"), "UnknownPositions: no positions 'somewhere'"),
        ("geometry", ("--layers", "1", "--scatter", "layer_2"), "layer_2 is not among the places that are measured"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line_before_a_model_loads(
    command: str, given: tuple[str, ...], message: str, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("by_layer", "one_question", "train"):
        monkeypatch.setattr(f"AutomaticEval.analysis.lens.{module}.model_of", None)  # calling it would be a TypeError
    done = within(command, str(asked), *given, "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]

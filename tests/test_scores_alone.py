"""Benchmarks without capture: scores of an edited model at several strengths, results that are always written, answers that are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import within

from AutomaticEval import Edit, editing, evaluate, evaluate_with_activations
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel


def test_strengths_of_a_direction_write_nothing_and_have_the_scores_of_captured_runs(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    direction = torch.randn(128, generator=torch.Generator().manual_seed(0))
    found = []
    for strength in (0.0, 4.0):
        with editing(demo, Edit.add("resid_post", strength * direction, layers=2)) as model:
            outcome = evaluate(model, "demo_facts", limit=4)
            captured = evaluate_with_activations(
                model, "demo_facts", limit=4, activation_save_dir=tmp_path / "kept", layers_to_capture=0
            )
        assert outcome.scores == captured.scores
        assert outcome.samples.keys() == captured.samples.keys()
        assert (outcome.folder, outcome.results_file) == (None, None)
        found.append([entry["resps"] for entry in outcome.samples["demo_facts"]])
    assert found[0] != found[1]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_is_given_holds_the_results(tmp_path: Path) -> None:
    outcome = evaluate("demo", ["demo_facts"], limit=2, output=tmp_path / "out", dtype="float32")
    assert outcome.results_file is not None
    assert (tmp_path / "out") in outcome.results_file.parents
    assert json.loads(outcome.results_file.read_text())["results"]["demo_facts"]
    (samples,) = outcome.results_file.parent.glob("samples_demo_facts_*.jsonl")
    assert len(samples.read_text().splitlines()) == 2


def test_a_command_without_capture_writes_its_results(tmp_path: Path) -> None:
    done = within("--benchmark", "demo_facts", "--limit", "2", cwd=tmp_path)
    assert done.returncode == 0
    (file,) = (tmp_path / "results").rglob("results_*.json")
    assert f"Results:     {file.relative_to(tmp_path)}" in done.stdout.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_results_of_an_edited_model_say_what_was_edited(demo: LoadedModel, tmp_path: Path) -> None:
    folders = tmp_path / "whole", tmp_path / "edited"
    benchmark = Benchmark(("demo_facts",), limit=1)
    run_benchmark(demo, benchmark, output_path=folders[0])
    with editing(demo, Edit.scale("layer_1.mlp_out", 0.0)):
        run_benchmark(demo, benchmark, output_path=folders[1])
    whole, edited = (json.loads(next(each.rglob("results_*.json")).read_text())["config"] for each in folders)
    assert "edits" not in whole
    assert edited == whole | {"edits": edited["edits"]}
    assert "layer_1.mlp_out" in edited["edits"][0]


@pytest.mark.parametrize("captures", [False, True])
def test_predict_only_says_where_the_answers_are(captures: bool, tmp_path: Path) -> None:
    flags = ["--capture_activations", "--layers", "0"] if captures else []
    done = within("--benchmark", "demo_arithmetic", "--limit", "2", "--predict_only", *flags, cwd=tmp_path)
    assert done.returncode == 0
    assert "bypass" not in done.stdout + done.stderr
    assert "999" not in done.stdout
    assert "2 questions answered, and none scored" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Answers:"))
    pattern = line.split(maxsplit=1)[1]
    (answers,) = (tmp_path / pattern).parent.glob(Path(pattern).name)  # a path below the folder of the command
    texts = [json.loads(each)["resps"][0][0] for each in answers.read_text().splitlines()]
    assert len(texts) == 2
    assert all(texts)

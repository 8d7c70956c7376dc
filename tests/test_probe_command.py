"""`main.py probe`: what a person types, reads and finds on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.probed import run_of

from AutomaticEval import difference_of_means, evaluate_with_activations, load_direction, open_run, probe
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel


@pytest.fixture(scope="module")
def asked(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo benchmark: facts with four choices, and sums with a generated answer."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    evaluate_with_activations(demo, "demo", limit=30, output=folder)
    return folder


def test_the_command_prints_writes_and_draws_what_the_function_gives(asked: Path, tmp_path: Path) -> None:
    """The two tasks can be told apart at each place, and by their words: the audit says so first."""
    options = ("--target", "task", "--sites", "resid_post", "--layers", "1-2", "--folds", "3", "--seed", "7")
    done = within("probe", str(asked), *options, "--save_direction", "task.safetensors", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    result = probe(open_run(asked), "task", ["layer_1", "resid_post.2"], n_folds=3, seed=7)
    assert written == json.loads(json.dumps(result.as_json()))
    assert (tmp_path / "out" / "probe.png").stat().st_size > 20_000
    assert [each["site"] for each in written["places"]] == ["layer_1", "layer_2"]
    assert written["classes"]["positive"] == "demo_facts"
    assert done.stdout.startswith("Finding:     ")
    text = " ".join(done.stdout.split())
    assert "words of the question (TF-IDF) tells the classes apart about as well as the best probe" in text
    assert "Best place: AUROC 1.000 [" in text
    for told in ("Difference of means", "the model's confidence", "shuffled labels", "it is the target"):
        assert told in text
    direction = load_direction(tmp_path / "task.safetensors")
    questions = open_run(asked).questions()
    sides = [task == "demo_facts" for task in questions.column("task")]
    (place, *_) = written["best"]["places"]
    torch.testing.assert_close(direction.vector, difference_of_means(questions, place, sides).vector)
    assert direction.made_from["label"] == "task: demo_facts against demo_arithmetic"
    again = within("probe", str(asked), "-o", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "out/probe.json exists and is not overwritten" in again.stderr


def test_choices_have_the_models_own_confidence_beside_the_probe(asked: Path) -> None:
    run = open_run(asked).where(task="demo_facts")
    measured = probe(run, "correct", ["layer_3"], n_folds=3).measured
    baselines = {each.name: each for each in measured["baselines"]}
    for name in ("confidence", "margin", "logprob", "answer_length", "embedding"):
        assert baselines[name].judged is not None
        assert baselines[name].judged.below_best.n == 30
    assert baselines["task"].reason == "there is one task"
    assert baselines["mean_logprob"].reason == "no answer was generated"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--layers", "9"), "UnknownLayer: no layer 9"),
        (("--sites", "mlp_out"), "SelectionError: "),
        (("--split", "tasks"), "SelectionError: no split 'tasks'; there are question, task."),
        (("--folds", "2"), "SelectionError: 2 folds were asked for; give at least 3"),
        (("--repeats", "0"), "SelectionError: 0 repeats were asked for; give 1 or more."),
        (("--position", "somewhere"), "UnknownPositions: no positions 'somewhere'"),
        (("--target", "prediction"), "SelectionError: prediction has"),
        (("--target", "prediction"), "or take one task (run.where(task=…), --task)"),
        (("--positive", "perhaps"), "SelectionError: no question has the correct perhaps; there are "),
        (
            ("--target", "nothing", "--save_direction", "direction.npy"),
            "direction.npy: a direction is written as .safetensors",
        ),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(
    given: tuple[str, ...], message: str, asked: Path, tmp_path: Path
) -> None:
    done = within("probe", str(asked), *given, "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_repeats_judge_each_question_several_times(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4))
    labels = np.arange(60) % 2
    rows[:, 0] += 2 * labels
    run_of(tmp_path / "run", {"layer_0": rows}, [{"correct": bool(each)} for each in labels])
    done = within("probe", "run", "--repeats", "3", "-o", "few.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "few.json").read_text())
    assert (written["settings"]["n_repeats"], sum(written["best"]["places"].values())) == (3, 15)
    assert (tmp_path / "probe.png").exists()
    assert "Audit:       no leak was found." in done.stdout


def test_few_tasks_are_drawn_without_intervals(tmp_path: Path) -> None:
    """Of three tasks no interval is made; the figure has the numbers all the same."""
    rows = np.random.default_rng(0).normal(size=(90, 4))
    labels = np.arange(90) % 2
    rows[:, 0] += 2 * labels
    columns = [{"correct": bool(each), "task": f"task{number % 3}"} for number, each in enumerate(labels)]
    run_of(tmp_path / "run", {"layer_0": rows, "layer_1": rows + 1}, columns)
    done = within("probe", "run", "--split", "task", "--folds", "3", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [each["probe"]["auroc"]["interval"] for each in written["places"]] == [None, None]
    assert (tmp_path / "out" / "probe.png").stat().st_size > 20_000

"""Saved probes: what is learned, kept and said of other questions, against scikit-learn and against the run itself."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import within
from helpers.probed import run_of
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from AutomaticEval import evaluate_with_activations, load_probe, open_run, probe
from AutomaticEval.analysis.probes.linear import Linear
from AutomaticEval.analysis.probes.saved.learned_on_all import learn_probe, usual_strength
from AutomaticEval.analysis.probes.saved.scores import is_path, scores_of
from AutomaticEval.errors import AutomaticEvalError, DamagedFile, UnreadableFile
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

N, WIDTH = 120, 6


def made(
    folder: Path, seed: int, width: int = WIDTH, first_doc: int = 0, site: str = "layer_1"
) -> tuple[Any, Any, Any]:
    """A run whose first number tells the label about, with its rows and labels."""
    source = np.random.default_rng(seed)
    labels = source.integers(0, 2, N)
    rows = source.normal(size=(N, width)).astype(np.float32) * 3 + 1
    rows[:, 0] += 4 * labels
    columns = [{"correct": bool(each), "doc_id": first_doc + number} for number, each in enumerate(labels)]
    words = [f"what is {first_doc + number} about" for number in range(N)]
    return run_of(folder, {site: rows}, columns, words), rows, labels


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """The file of a probe, its run, and the run's rows and labels."""
    folder = tmp_path_factory.mktemp("saved")
    run, rows, labels = made(folder / "a", 0)
    done = within("probe", "a", "--save_probe", "p.safetensors", "-o", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Probe:       layer_1, 120 questions" in done.stdout
    return folder / "p.safetensors", run, rows, labels


def test_a_saved_probe_is_scikit_learns_over_all_questions(saved: Any) -> None:
    file, run, rows, labels = saved
    one = load_probe(file)
    scaler = StandardScaler().fit(rows)
    plain = LogisticRegression(C=one.strength, max_iter=1000, tol=1e-8).fit(scaler.transform(rows), labels)
    # ours stops at a gradient of 1e-3, in float32
    np.testing.assert_allclose(one.log_odds(rows), plain.decision_function(scaler.transform(rows)), atol=0.02)
    exact = logistic_of(rows, labels, one.strength)
    np.testing.assert_allclose(one.log_odds(rows), exact.decision_function(standard(rows)), atol=1e-5)
    assert (one.site, one.position, one.target, one.positive, one.negative) == (
        *("layer_1", "prompt[-1]", "correct"),
        *("true", "false"),
    )
    assert {str(each.dtype) for name, each in load_file(file).items() if name != "learned_from"} == {"torch.float32"}
    result = probe(run)
    assert one.strength == result.measured["best"]["strength"]
    np.testing.assert_array_equal(learn_probe(run, result).weights, one.weights)


def standard(rows: Any) -> Any:
    return (rows - rows.mean(0)) / rows.std(0)


def logistic_of(rows: Any, labels: Any, strength: float) -> LogisticRegression:
    """With the same end of the search."""
    return LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(standard(rows), labels)


def test_the_strength_is_the_one_that_most_folds_chose() -> None:
    def chosen(*strengths: float) -> list[Linear]:
        return [Linear(0, 1, np.zeros(1), 0.0, each) for each in strengths]

    assert usual_strength([chosen(0.1, 1.0), chosen(1.0)]) == 1.0
    assert usual_strength([chosen(1.0, 0.1)]) == 0.1


def test_another_run_is_scored_without_what_was_learned_from(saved: Any, tmp_path: Path) -> None:
    """60 documents are in both runs."""
    file, *_ = saved
    run, rows, labels = made(tmp_path / "b", 3, first_doc=60)
    one = load_probe(file)
    scores = scores_of(one, run)
    by_hand = ((rows - one.shift.numpy()) / one.scale.numpy()) @ one.weights.numpy() + one.bias.numpy()
    np.testing.assert_allclose(scores.columns["probability"], 1 / (1 + np.exp(-by_hand.astype(float))), rtol=1e-4)
    assert scores.columns["is_learned"] == [number < 60 for number in range(N)]
    assert (scores.n_learned, scores.auroc.n) == (60, 60)
    assert scores.auroc.mean == pytest.approx(roc_auc_score(labels[60:], by_hand[60:]))
    done = within("probe_score", str(file), "b", "-o", "scores.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"AUROC:       {scores.auroc.mean:.3f}" in done.stdout
    assert "(60 questions; 60 that the probe learned from are left out)" in done.stdout
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["columns"] == json.loads(json.dumps(scores.columns))
    own = scores_of(one, open_run(saved[1].path))
    assert (own.auroc.mean, own.n_learned) == (None, N)
    with_none = scores_of(one, unlabelled(tmp_path / "c"))
    assert with_none.columns["label"] == [None] * N
    assert with_none.auroc.mean is None


def unlabelled(folder: Path) -> Any:
    return run_of(folder, {"layer_1": np.ones((N, WIDTH))}, [{} for _ in range(N)])


def test_a_prompt_has_the_probability_of_the_same_question_in_the_run(demo: LoadedModel, tmp_path: Path) -> None:
    evaluate_with_activations(demo, "demo_facts", limit=30, output=tmp_path / "run")
    run = open_run(tmp_path / "run")
    result = probe(run, "answer", ["layer_1", "layer_2"], positive=0, n_folds=3)
    learn_probe(run, result).save(tmp_path / "p.safetensors")
    one = load_probe(tmp_path / "p.safetensors")
    question = run.questions()[4].question
    done = within("probe_score", "p.safetensors", question, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Probability: {scores_of(one, run).columns['probability'][4]:.3f} of answer: 0" in done.stdout
    *_, last = run.questions()[4].tokens.values()
    assert f"Read:        the token {last!r}, prompt[-1], at {one.site}" in done.stdout
    assert f"Probe:       AUROC {result.measured['best']['judged'].auroc.mean:.3f} [" in done.stdout
    far = dataclasses.replace(one, position="prompt[-5]", made_from={"auroc_out_of_fold": 0.5})
    far.save(tmp_path / "far.safetensors")
    short = within("probe_score", "far.safetensors", "Hi", cwd=tmp_path)
    assert short.returncode == 2
    assert re.search(r"^SelectionError: the prompt has [1-4] tokens, and the probe reads prompt\[-5\];", short.stderr)
    with pytest.warns(UserWarning, match="the probe was at chance where it was made"):
        assert within("probe_score", "far.safetensors", question, cwd=tmp_path).returncode == 0
    wrong = within("probe_score", "p.safetensors", "run", "--model", "demo", cwd=tmp_path)
    assert "--model was given, but a run is scored" in wrong.stderr


def test_what_does_not_fit_is_refused(saved: Any, tmp_path: Path) -> None:
    file, *_ = saved
    made(tmp_path / "wide", 1, width=7)
    made(tmp_path / "elsewhere", 1, site="layer_0")
    for what, message in (
        ("wide", "layer_1 has 7 numbers in"),
        ("elsewhere", "layer_1"),
        ("activations/none", "no file or run folder"),
    ):
        done = within("probe_score", str(file), what, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
    with pytest.raises(AutomaticEvalError, match=r"the rows are \[2, 3\]; a probe of layer_1 needs"):
        load_probe(file).log_odds(np.ones((2, 3)))
    save_file(load_file(file), tmp_path / "other.safetensors")
    with pytest.raises(UnreadableFile, match=r"holds other tensors, and no probe"):
        load_probe(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("none")
    with pytest.raises(UnreadableFile, match=r"is no safetensors file"):
        load_probe(tmp_path / "text.safetensors")
    broken = load_probe(file)
    object.__setattr__(broken, "scale", broken.scale[:3])
    broken.save(tmp_path / "broken.safetensors")
    with pytest.raises(DamagedFile, match=r"weights, shift and scale of a probe are"):
        load_probe(tmp_path / "broken.safetensors")
    again = within("probe", str(saved[1].path), "--save_probe", str(file), "-o", "out", cwd=tmp_path)
    assert again.stderr.rstrip().endswith("exists and is not overwritten; choose another name.")
    (tmp_path / "d.safetensors").touch()
    direction = within("probe", str(saved[1].path), "--save_direction", "d.safetensors", "-o", "out", cwd=tmp_path)
    assert direction.stderr.rstrip().endswith("d.safetensors exists and is not overwritten; choose another name.")
    tuned = within("lens", str(saved[1].path), "--train_tuned", "d.safetensors", "-o", "out", cwd=tmp_path)
    assert tuned.stderr.rstrip().endswith("d.safetensors exists and is not overwritten; choose another name.")
    assert not (tmp_path / "out").exists()


def test_which_texts_are_paths(tmp_path: Path) -> None:
    assert all(map(is_path, ["runs/mmlu", "mmlu_2026", "x.h5", str(tmp_path)]))
    assert not any(map(is_path, ["Is it and/or?", "Hello", "法国的首都", "a" * 5000 + " b"]))

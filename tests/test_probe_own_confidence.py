"""Baselines of the model's own confidence: which questions have one, and findings where the probe does not beat it."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import within
from helpers.probed import run_of

from AutomaticEval import probe
from AutomaticEval.store.run import Run

N = 120
LABELS = np.random.default_rng(9).integers(0, 2, N)


def made(folder: Path, share: float, strength: float = 0.0) -> Run:
    """Answers whose log-probability says whether they are right; so many of them have one. Rows tell it with the strength."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(N, 4))
    rows[:, 0] += strength * LABELS
    logprobs = 1.2 * LABELS + draw.normal(size=N) - 5
    has = np.arange(N) < share * N
    columns = [
        {
            "correct": bool(label),
            "task": "one" if there else "two",
            **({"token_logprobs": array("f", [value])} if there else {}),
        }
        for label, value, there in zip(LABELS, logprobs.tolist(), has.tolist(), strict=True)
    ]
    return run_of(folder, {"layer_0": rows}, columns)


def texts(measured: Any) -> dict[str, str]:
    return {each.name: each.text for each in measured["findings"]}


def own(measured: Any) -> Any:
    (found,) = (each for each in measured["baselines"] if each.name == "mean_logprob")
    return found


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("half") / "run", 0.5)


def test_a_baseline_that_only_some_questions_have_says_so(half: Run, tmp_path: Path) -> None:
    measured = probe(half).measured
    assert own(measured).n_known == 60
    assert own(measured).told == "mean log-probability of the answer's tokens, known for 60 of 120"
    told = texts(measured)["partly_known:mean_logprob"]
    assert "is known for 60 of 120 questions" in told
    assert told.endswith("compare one task at a time: run.where(task=…), --task.")
    done = within("probe", str(half.path), "--task", "one", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert written["settings"]["task"] == "one"
    assert sum(written["classes"][name] for name in ("n_positive", "n_negative")) == 60
    (alone,) = (each for each in written["baselines"] if each["name"] == "mean_logprob")
    assert (alone["n_known"], alone["told"]) == (60, "mean log-probability of the answer's tokens")
    assert not [each for each in written["findings"] if each["name"].startswith("partly_known")]
    wrong = within("probe", str(half.path), "--task", "three", "-o", "none", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "three" in wrong.stderr


def test_a_model_that_knows_it_itself_is_a_finding_also_where_the_probe_is_at_chance(tmp_path: Path) -> None:
    measured = probe(made(tmp_path / "run", 1.0)).measured
    told = texts(measured)
    auroc = own(measured).judged.auroc.mean
    assert told["own_confidence:mean_logprob"].startswith(
        f"the mean log-probability of the model's own answer tells right from wrong: AUROC {auroc:.3f} ["
    )
    assert told["own_confidence:mean_logprob"].endswith("is worse.")
    assert "at_chance" in told
    assert "partly_known:mean_logprob" not in told
    beaten = probe(made(tmp_path / "strong", 1.0, 6.0)).measured
    assert own(beaten).judged.below_best.interval[0] > 0
    assert "own_confidence:mean_logprob" not in texts(beaten)
    alike = texts(probe(made(tmp_path / "alike", 1.0, 1.2)).measured)
    assert alike["own_confidence:mean_logprob"].endswith("does not beat it.")


def test_words_that_are_better_than_the_probe_are_said_to_be(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(N, 4))
    columns = [{"correct": bool(each), "response": "word " * (2 + 3 * each)} for each in LABELS]
    told = texts(probe(run_of(tmp_path / "run", {"layer_0": rows}, columns)).measured)
    assert "tells the classes apart better than the best probe" in told["as_good_as_probe:answer_length"]

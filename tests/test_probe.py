"""Probes of runs: what is planted is found where it is planted, and leaks are named before any number."""

from __future__ import annotations

import dataclasses
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.probed import WORDS, run_of

from AutomaticEval import probe
from AutomaticEval.analysis.probes.leaks.audit import findings, is_above_chance, is_off_chance
from AutomaticEval.analysis.probes.target import target_of
from AutomaticEval.analysis.result import Estimate
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.store.run import Run

N, WIDTH = 200, 12
STRENGTH = 1.5
TRUE_AUROC = 0.8556
"""Of two normals whose means are 1.5 standard deviations apart: the normal distribution function at 1.5 / sqrt(2)."""


def noise(seed: int, n: int = N) -> Any:
    return np.random.default_rng(seed).normal(size=(n, WIDTH))


def labels_of(n: int = N) -> Any:
    return np.random.default_rng(9).integers(0, 2, n)


def names(result: Any) -> list[str]:
    return [each.name for each in result.measured["findings"]]


def found(result: Any) -> dict[str, Any]:
    return {each.site: each for each in result.measured["places"]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four layers of noise; in one of them right answers lie further along a direction."""
    sites = {f"layer_{layer}": noise(layer + 20) for layer in range(4)}
    sites["layer_2"][:, 4] += STRENGTH * labels_of()
    columns = [{"correct": bool(each)} for each in labels_of()]
    return run_of(tmp_path_factory.mktemp("planted") / "run", {"embeddings": np.ones((N, WIDTH)), **sites}, columns)


@pytest.fixture(scope="module")
def result(planted: Run) -> Any:
    return probe(planted)


def test_a_planted_direction_is_found_at_its_layer_at_its_strength_and_nowhere_else(result: Any) -> None:
    places = found(result)
    assert list(result.measured["best"]["places"]) == ["layer_2"]
    low, high = result.measured["best"]["judged"].auroc.interval
    assert low < TRUE_AUROC < high
    assert low > 0.7
    for site, each in places.items():
        for auroc in (each.probe.auroc, each.difference_of_means):
            assert (auroc.simultaneous[0] > 0.5) == (site == "layer_2"), site
        assert (each.p < 0.05) == (site == "layer_2")
    assert places["layer_2"].probe.below_best.mean == 0
    assert places["layer_0"].probe.below_best.interval[0] > 0
    assert names(result) == []


def test_every_baseline_is_there_or_says_why_not(result: Any) -> None:
    baselines = {each.name: each for each in result.measured["baselines"]}
    assert list(baselines) == [
        "majority",
        "confidence",
        "margin",
        "logprob",
        "mean_logprob",
        "question_length",
        "answer_length",
        "task",
        "question_words",
        "answer_words",
        "embedding",
        "shuffled",
    ]
    assert all((each.judged is None) == (each.reason is not None) for each in baselines.values())
    share = labels_of().mean()
    assert baselines["majority"].judged.accuracy.mean == pytest.approx(max(share, 1 - share), abs=0.02)
    assert baselines["confidence"].reason == "no question has several scored choices"
    for name in ("majority", "embedding", "shuffled", "question_words"):
        low, high = baselines[name].judged.auroc.interval
        assert low <= 0.5 <= high


def test_shuffled_labels_are_at_chance(planted: Run, tmp_path: Path) -> None:
    shuffled = np.random.default_rng(1).permutation(labels_of())
    rows = {"layer_2": noise(2)}
    rows["layer_2"][:, 4] += STRENGTH * labels_of()
    measured = probe(run_of(tmp_path / "run", rows, [{"correct": bool(each)} for each in shuffled])).measured
    low, high = measured["best"]["judged"].auroc.interval
    assert low < 0.5 < high
    assert [each.name for each in measured["findings"]] == ["at_chance"]


def test_the_audit_names_a_label_that_follows_the_length_of_the_answer(tmp_path: Path) -> None:
    labels = labels_of()
    columns = [
        {"correct": bool(each), "response": "word " * (2 + 3 * each + number % 3)} for number, each in enumerate(labels)
    ]
    rows = noise(1)
    rows[:, 0] += 0.5 * labels
    measured = probe(run_of(tmp_path / "run", {"layer_0": rows}, columns)).measured
    told = {each.name: each.text for each in measured["findings"]}
    assert "correct follows the length of the answer: AUROC 1.000" in told["follows:answer_length"]
    assert (
        "length of the answer tells the classes apart better than the best probe"
        in told["as_good_as_probe:answer_length"]
    )


def test_the_audit_names_the_place_of_the_right_choice(tmp_path: Path) -> None:
    """The model takes A each time: it is right where A is."""
    draw = np.random.default_rng(2)
    targets = draw.integers(0, 4, N)
    columns = [{"correct": bool(each == 0), "target": int(each), "choices": list("ABCD")} for each in targets]
    result = probe(run_of(tmp_path / "run", {"layer_0": noise(3)}, columns))
    assert "follows:right_choice" in names(result)


def test_one_value_is_told_from_all_others(tmp_path: Path) -> None:
    targets = np.random.default_rng(2).integers(0, 4, N)
    rows = noise(3)
    rows[:, 0] += 2 * (targets == 2)
    run = run_of(tmp_path / "run", {"layer_0": rows}, [{"target": int(each)} for each in targets])
    measured = probe(run, "answer", positive=2).measured
    assert measured["classes"] | {} == {
        "target": "answer",
        "positive": "2",
        "negative": "the other 3",
        "n_positive": int((targets == 2).sum()),
        "n_negative": int((targets != 2).sum()),
        "n_left_out": 0,
        "n_groups": N,
    }
    assert measured["best"]["judged"].auroc.interval[0] > 0.8
    with pytest.raises(SelectionError, match="no question has the answer 7; there are"):
        probe(run, "answer", positive=7)


def test_the_audit_names_what_the_embedding_and_the_first_token_know(tmp_path: Path) -> None:
    """In one run the label is in the token itself, in the other in a token that has seen no other."""
    labels = labels_of()
    columns = [{"correct": bool(each)} for each in labels]
    told, plain = noise(11), noise(12)
    told[:, 1] += 2 * labels
    in_token = run_of(tmp_path / "token", {"embeddings": told, "layer_0": told + noise(13)}, columns)
    assert "follows:embedding" in names(probe(in_token))
    in_first = run_of(tmp_path / "first", {"layer_0": plain}, columns, first={"layer_0": told})
    result = probe(in_first)
    assert names(result) == ["follows:first_token", "at_chance"]
    checks = {each.name: each for each in result.measured["checks"]}
    assert checks["first_token"].judged.auroc.mean > 0.85
    same = run_of(tmp_path / "same", {"layer_0": plain}, columns, first={"layer_0": np.ones((N, WIDTH))})
    checks = {each.name: each.reason for each in probe(same).measured["checks"]}
    assert checks["first_token"] == "all prompts begin with the same token"


def test_the_audit_names_near_duplicates_and_words(tmp_path: Path) -> None:
    """Half of the prompts are another one with one word changed, and with the same label."""
    draw = np.random.default_rng(4)
    first = [" ".join(draw.choice(WORDS, 40)) for _ in range(N // 2)]
    second = [text.replace(text.split()[20], "changed") for text in first]
    labels = np.tile(draw.integers(0, 2, N // 2), 2)
    columns = [{"correct": bool(each)} for each in labels]
    result = probe(run_of(tmp_path / "run", {"layer_0": noise(5)}, columns, [*first, *second]))
    (told,) = (each.text for each in result.measured["findings"] if each.name == "near_duplicates")
    n_told, _, rest = told.partition(" ")
    assert int(n_told) > N / 2  # the share of equal parts is an estimate, of 0.85 here
    assert rest.startswith(f"of {N} questions are near duplicates")
    assert "as_good_as_probe:question_words" in names(result)


def test_equal_prompts_are_never_on_both_sides(tmp_path: Path) -> None:
    """Each prompt is asked four times, and its rows and labels are its own: told apart only by who has seen it."""
    draw = np.random.default_rng(6)
    labels, rows = np.repeat(draw.integers(0, 2, N // 4), 4), np.repeat(draw.normal(size=(N // 4, WIDTH)), 4, 0)
    prompts = [" ".join(draw.choice(WORDS, 12)) for _ in range(N // 4) for prompt in [0]]
    columns = [{"correct": bool(each)} for each in labels]
    run = run_of(tmp_path / "run", {"layer_0": rows}, columns, [each for each in prompts for _ in range(4)])
    measured = probe(run).measured
    assert measured["classes"]["n_groups"] == N // 4
    low, high = measured["best"]["judged"].auroc.interval
    assert low < 0.5 < high


def test_classes_that_differ_only_by_task_are_at_chance_when_whole_tasks_are_left_out(tmp_path: Path) -> None:
    draw = np.random.default_rng(7)
    n_tasks, each = 12, 25
    tasks = np.repeat(np.arange(n_tasks), each)
    labels = draw.random(n_tasks * each) < np.where(tasks % 2, 0.85, 0.15)
    rows = (2 * draw.normal(size=(n_tasks, WIDTH)))[tasks] + draw.normal(size=(len(tasks), WIDTH))
    columns = [{"correct": bool(label), "task": f"task{task}"} for label, task in zip(labels, tasks, strict=True)]
    run = run_of(tmp_path / "run", {"layer_0": rows}, columns)
    by_question, by_task = probe(run), probe(run, split="task")
    assert by_question.measured["best"]["judged"].auroc.interval[0] > 0.7
    assert "as_good_as_probe:task" in names(by_question)
    low, high = by_task.measured["best"]["judged"].auroc.interval
    assert low < 0.5 < high
    assert names(by_task) == ["at_chance"]
    assert by_task.measured["classes"]["n_groups"] == n_tasks
    with pytest.raises(StoreError, match=r"has 1 task\(s\); split='task' needs at least 3"):
        probe(run.where(task="task1"), split="task")


def test_equal_scores_are_at_chance_whatever_their_rounding() -> None:
    near = 0.5 + 3e-13
    assert not is_above_chance(Estimate(near, (near, near), 1000))
    assert not is_off_chance(Estimate(near, (near, near), 1000))
    assert is_above_chance(Estimate(0.6, (0.55, 0.65), 1000))
    assert not is_above_chance(Estimate(0.6, (0.55, 0.65), 1000, (0.49, 0.7)))
    assert is_off_chance(Estimate(0.4, (0.35, 0.45), 1000))


def test_shuffled_labels_off_chance_are_told_first_and_are_grave(planted: Run, result: Any) -> None:
    """As if the shuffled labels had given what the true ones give."""
    target = target_of(planted.questions())
    (shuffled,) = (each for each in result.measured["baselines"] if each.name == "shuffled")
    broken = dataclasses.replace(shuffled, judged=result.measured["best"]["judged"])
    first, *others = findings(result.measured["best"]["judged"], [broken], target, ["last"])
    assert (first.name, first.is_grave) == ("shuffled", True)
    assert "believe no number here" in first.text
    assert [each.name for each in others] == ["position_in_answer"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": "corect"}, "corect"),
        ({"split": "tasks"}, "no split 'tasks'; there are question, task"),
        ({"n_folds": 2}, "2 folds were asked for; give at least 3"),
        ({"n_repeats": 0}, "0 repeats were asked for"),
        ({"keys": ["layer_9"]}, "layer_9"),
        ({"position": "prompt[-2]"}, "was not stored"),
        ({"position": 7}, 'position is 7; write a text, or a list of texts, such as "prompt[-1]"'),
        ({"position": [7]}, "write a text"),
        ({"position": "banana"}, "write a position of one token: prompt[-1], prompt[-3], response[0]"),
        ({"grid": True, "position": "prompt[-1]"}, "leave one out"),
        ({"transfer": "other"}, "transfer is a list of runs; write transfer=[…]"),
        ({"transfer": [7]}, "int is no run; give open_run(path), or the path"),
        ({"target": "question"}, "question is a text with 200 values in 200 questions, and no class"),
    ],
)
def test_what_cannot_be_asked_is_told(planted: Run, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((SelectionError, StoreError), match=re.escape(message)):
        probe(planted, **wrong)


def test_a_path_is_opened_and_numbers_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        probe("nowhere")
    columns = [{"token_logprobs": array("f", [-value])} for value in (1.5, 2.5, 3.5) for _ in range(5)]
    run_of(tmp_path / "run", {"layer_0": noise(1, 15)}, columns)
    with pytest.raises(SelectionError, match="mean_logprob is a number with 3 values in 15 questions, and no class"):
        probe(tmp_path / "run", "mean_logprob")


def test_too_few_questions_are_told_with_the_number_that_is_needed(tmp_path: Path, planted: Run) -> None:
    with pytest.raises(StoreError, match=r"all \d+ have true\. Ask questions of both classes"):
        probe(planted.where(correct=True))
    few = planted.where(~labels_of().astype(bool) | (np.cumsum(labels_of()) <= 3))
    with pytest.raises(StoreError, match="3 different questions have the label 1; 5 folds need at least 5 of each"):
        probe(few)
    rows = noise(1, 20)
    rows[3, 2] = np.inf
    columns = [{"correct": bool(number % 2)} for number in range(20)]
    with pytest.raises(StoreError, match=r"rows of 1 questions at layer_0 .* infinite or NaN.*t document 3"):
        probe(run_of(tmp_path / "run", {"layer_0": rows}, columns))


def test_rows_inside_the_answer_are_said_to_be(planted: Run) -> None:
    """A run that kept the last token of the prompt has it as its last row, too."""
    assert names(probe(planted, position="last"))[0] == "position_in_answer"

"""What `correct` says, and of which tasks it says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import within
from lm_eval.api.instance import Instance
from lm_eval.filters import build_filter_ensemble

from AutomaticEval import HFActivations, evaluate_with_activations, open_run
from AutomaticEval.errors import BenchmarkError
from AutomaticEval.evaluation.results.join import join, main_metric, scores_of, without_verdict
from AutomaticEval.evaluation.results.repeats import needs_several, score_repeats
from AutomaticEval.evaluation.results.request_key import RequestKey
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

DATA = """
from datasets import Dataset, DatasetDict

def words(**unused):
    words = [{"q": f"The colour {n} is", "choices": [" red", " blue"], "gold": n % 2} for n in range(6)]
    return DatasetDict({"test": Dataset.from_list(words)})

def prefers(doc, results):
    (first, _), (second, _) = results
    return {"likelihood_diff": abs(first - second), "pct_stereotype": float(first > second)}

def toxic(doc, results):
    return {"acc_toxic": 1.0, "acc": float(results[0][0] > results[1][0])}
"""
TASK = """
task: NAME
custom_dataset: !function data.words
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
"""
BIASED = """process_results: !function data.prefers
metric_list:
  - {metric: likelihood_diff, aggregation: mean, higher_is_better: false}
  - {metric: pct_stereotype, aggregation: mean, higher_is_better: false}
"""
TOXIC = """process_results: !function data.toxic
metric_list:
  - {metric: acc_toxic, aggregation: mean, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
RIGHT = """metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.py").write_text(DATA)
    for name, metrics in {"biased": BIASED, "toxic": TOXIC, "right": RIGHT}.items():
        (folder / f"{name}.yaml").write_text(TASK.replace("NAME", name) + metrics)
    return str(folder)


def entries(**metrics: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Of each document the values of a task's metrics, as lm-eval logs them."""
    n_docs = len(next(iter(metrics.values())))
    return [
        {"doc_id": doc, "metrics": list(metrics), **{name: values[doc] for name, values in metrics.items()}}
        for doc in range(n_docs)
    ]


@pytest.mark.parametrize(
    ("metrics", "better", "found"),
    [
        ({"acc": (1.0, 0.0)}, {"acc": True}, "acc"),
        ({"acc": (1.0, 0.0)}, {}, "acc"),  # a direction that nobody states
        ({"acc": (1.0, 0.0)}, {"acc": False}, None),
        ({"pct_stereotype": (1.0, 0.0)}, {"pct_stereotype": False}, None),
        ({"toxicity": (0, 1)}, {"toxicity": True}, None),
        ({"bleu": (0.0, 1.0), "f1": (1.0, 1.0)}, {"bleu": True, "f1": True}, None),  # by chance
        ({"f1": (1.0, 0.0), "exact_match": (0.0, 1.0)}, {}, "exact_match"),
        ({"percent_parseable": (1, 1), "em": (1, 0)}, {}, "em"),
        ({"acc": (0.5, 1.0), "acc_norm": (1.0, 0.0)}, {}, "acc_norm"),
        ({"pass@1": (1.0, 0.0)}, {}, "pass@1"),
        ({"prompt_level_strict_acc": (True, False)}, {}, "prompt_level_strict_acc"),
        ({"partial_accuracy": (1.0, 0.0)}, {}, None),
        ({"bypass": (999, 999)}, {}, None),
        ({"acc": ({"idx": 1}, {"idx": 0})}, {}, None),
    ],
)
def test_a_verdict_is_one_by_its_name_and_direction(metrics: Any, better: Any, found: str | None) -> None:
    assert main_metric(entries(**metrics), better) == found


def test_questions_without_a_verdict_are_left_out_of_all_questions() -> None:
    samples = {"quiz": entries(acc=(1.0, 0.0, 1.0)), "bias": entries(pct=(1.0, 1.0))}
    results = {"results": {"quiz": {}, "bias": {}}, "higher_is_better": {"bias": {"pct": False}}}
    for each in (*samples["quiz"], *samples["bias"]):
        each["arguments"] = []
    (overall,) = scores_of(results, samples, {"quiz": 30, "bias": 20}, 50)
    assert (overall.value, overall.answered, overall.total) == (pytest.approx(2 / 3), 3, 30)
    assert without_verdict(results, samples) == ["bias"]


def test_run_says_nothing_where_lower_is_better(demo: LoadedModel, tasks: str, tmp_path: Path) -> None:
    outcome = evaluate_with_activations(
        demo.model, "biased,toxic,right", tokenizer=demo.tokenizer, include_path=tasks, activation_save_dir=tmp_path
    )
    table = open_run(outcome.folder or "").table()
    assert table[table.task == "biased"].correct.isna().all()
    assert outcome.without_verdict == ["biased"]
    for task in ("toxic", "right"):
        said = {entry["doc_id"]: entry["acc"] for entry in outcome.samples[task]}
        own = table[table.task == task]
        assert own.correct.tolist() == [bool(said[doc]) for doc in own.doc_id]
    (overall,) = [score for score in outcome.scores if score.task == "all questions"]
    assert (overall.answered, overall.total) == (12, 12)


def test_instance_says_nothing_where_lower_is_better(demo: LoadedModel, tasks: str, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm = HFActivations(demo.model, tokenizer=demo.tokenizer, activation_save_dir=tmp_path)
    manager = TaskManager(include_path=[tasks], include_defaults=False)
    run = open_run(lm.finish(simple_evaluate(model=lm, tasks=["biased", "right"], task_manager=manager)))
    table = run.table()
    assert table[table.task == "biased"].correct.isna().all()
    assert table[table.task == "right"].correct.notna().all()


def test_command_names_the_tasks_without_a_verdict(tasks: str, tmp_path: Path) -> None:
    done = within("--benchmark", "biased,right", "--include_path", tasks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No verdict:  biased (column correct is none)" in done.stdout
    assert "6 of 6" in done.stdout.split("all questions")[1]


class Answered:
    """A task whose question was answered several times, and whose metric fails over one of the answers."""

    def __init__(self, *filters: Any) -> None:
        self._filters = [build_filter_ensemble(f"filter {n}", steps) for n, steps in enumerate(filters)]
        self.instances = [Instance("generate_until", {"gold": "7"}, ("q", {}), 0, metadata=("sums", 4, 3))]
        self.instances[0].resps = ["7", "8", "none at all"]

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        return {"exact_match": int(int(results[0]) == int(doc["gold"]))}


def test_failure_of_a_tasks_own_metric_names_task_document_and_filter() -> None:
    with pytest.raises(BenchmarkError, match=r"'sums' cannot score answer 2 to document 4.*'filter 0'.*none at all"):
        score_repeats({"sums": Answered([["take_first", None]])}, None)


def test_failure_of_a_tasks_own_filter_is_no_verdict_in_silence() -> None:
    task: Any = Answered([["regex", {"regex_pattern": "(7)", "group_select": 3}], ["take_first", None]])
    with pytest.raises(BenchmarkError, match=r"document 4.*'filter 0'"):
        score_repeats({"sums": task}, None)


@pytest.mark.parametrize(
    ("steps", "several"),
    [
        ([["take_first", None]], False),
        ([["take_first_k", {"k": 1}], ["take_first", None]], False),
        ([["take_first_k", {"k": 8}], ["majority_vote", None], ["take_first", None]], True),
        ([["lowercase", None], ["take_first_k", {"k": 2}]], True),
        ([["majority_vote", None], ["take_first", None]], False),
    ],
)
def test_filters_that_need_several_answers_are_known(steps: Any, several: bool) -> None:
    assert needs_several(build_filter_ensemble("f", steps)) is several


def test_answers_that_were_not_scored_by_themselves_have_no_verdict() -> None:
    """As `HFActivations` has it, which is given results and no tasks: the question's verdict is not each answer's."""
    logged = {
        "doc_id": 0,
        "filter": "none",
        "target": "7",
        "prompt_hash": "h",
        "filtered_resps": ["7"],
        "arguments": [("q", {})],
        "resps": [["7", "8"]],
        "metrics": ["exact_match"],
        "exact_match": 1.0,
    }
    records = [
        {**RequestKey("sums", 0, 0, repeat)._asdict(), "prompt": "q", "response": response}
        for repeat, response in enumerate(["7", "8"])
    ]
    assert [each["correct"] for each in join(records, {"sums": [logged]})] == [None, None]
    own = {RequestKey("sums", 0, 0, 1): {"none": {"filtered": "8", "metrics": {"exact_match": 0}}}}
    assert [each["correct"] for each in join(records, {"sums": [logged]}, own)] == [None, False]

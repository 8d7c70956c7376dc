"""Scores each of several sampled answers to one question by itself.

lm-eval scores a question once, on what its filters make of all answers, which is usually the first answer alone. Here the same filters and
metrics score each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from lm_eval.api.filter import FilterEnsemble
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.filters.selection import TakeKFilter

from AutomaticEval.errors import BenchmarkError, first_line
from AutomaticEval.evaluation.results.request_key import RequestKey

Verdicts = dict[RequestKey, dict[str, dict[str, Any]]]
"""Request -> filter -> {"filtered": the answer after it, "metrics": metric -> value}."""


def score_repeats(tasks: Mapping[str, Task], doc_ids: Mapping[str, Sequence[int]] | None) -> Verdicts:
    """The verdict on each answer to the questions that were answered more than once.

    tasks: the tasks after the evaluation. doc_ids: task -> the documents' own indices, when only some were asked.
    Raises BenchmarkError when a task's own filter or metric fails over an answer.
    """
    verdicts: Verdicts = {}
    for name, task in tasks.items():
        own = (doc_ids or {}).get(name)
        for instance in task.instances:
            if instance.request_type != "generate_until" or instance.repeats < 2:
                continue
            doc_id = instance.doc_id if own is None else own[instance.doc_id]
            for repeat, response in enumerate(instance.resps):
                key = RequestKey(name, doc_id, instance.idx, repeat)
                verdicts[key] = _score(task, instance, response, key)
    return verdicts


def _score(task: Task, instance: Instance, response: str, key: RequestKey) -> dict[str, dict[str, Any]]:
    """Filter -> its verdict on one answer, for each filter that takes a single answer: "the first of eight" does, a majority does not."""
    verdicts = {}
    for ensemble in task._filters:
        if needs_several(ensemble):
            continue
        alone = copy(instance)
        alone.resps, alone.filtered_resps = [response], {}
        try:
            ensemble.apply([alone])
            filtered = alone.filtered_resps[ensemble.name]
            metrics = dict(task.process_results(instance.doc, [filtered]))
        except Exception as failure:  # filters and metrics are a task's own programs, and raise what they like
            raise BenchmarkError(
                f"the task {key.task!r} cannot score answer {key.repeat} to document {key.doc_id} by itself: its filter "
                f"{ensemble.name!r}, or the metric after it, failed over {response[:60]!r} ({type(failure).__name__}: "
                f"{first_line(failure)}). Mend the task; then the same command with --resume finishes the run, and computes nothing again."
            ) from failure
        verdicts[ensemble.name] = {"filtered": filtered, "metrics": metrics}
    return verdicts


def needs_several(ensemble: FilterEnsemble) -> bool:
    """Whether a filter needs several answers to a question. lm-eval's take_first_k does when k is more than one.

    None of lm-eval's other filters does. A filter that a task brings along is expected to take any number of answers.
    """
    steps = [make() for make in ensemble.filters]
    return any(isinstance(step, TakeKFilter) and step.k > 1 for step in steps)

"""Each of several sampled answers to one question, scored by itself.

lm-eval scores a question once, whatever its filters make of all answers (usually the first alone); beside each answer stands
what those filters and metrics say of that answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from AutomaticEval.evaluation.resuming import RequestKey

Verdicts = dict[RequestKey, dict[str, dict[str, Any]]]
"""Request -> filter -> {"filtered": the answer after it, "metrics": metric -> value}."""


def score_repeats(tasks: Mapping[str, Task], doc_ids: Mapping[str, Sequence[int]] | None) -> Verdicts:
    """What each answer is worth, of the questions that were answered more than once.

    tasks: as they are after the evaluation. doc_ids: task -> the documents' own indices, when only some were asked.
    """
    found: Verdicts = {}
    for name, task in tasks.items():
        own = (doc_ids or {}).get(name)
        for instance in task.instances:
            if instance.request_type != "generate_until" or instance.repeats < 2:
                continue
            doc_id = instance.doc_id if own is None else own[instance.doc_id]
            for repeat, response in enumerate(instance.resps):
                found[RequestKey(name, doc_id, instance.idx, repeat)] = _score(task, instance, response)
    return found


def _score(task: Task, instance: Instance, response: str) -> dict[str, dict[str, Any]]:
    """By each filter that can take one answer alone: a majority of eight cannot."""
    found = {}
    for ensemble in task._filters:
        alone = copy(instance)
        alone.resps, alone.filtered_resps = [response], {}
        with suppress(AssertionError, ValueError, TypeError, IndexError, KeyError):
            ensemble.apply([alone])
            filtered = alone.filtered_resps[ensemble.name]
            metrics = dict(task.process_results(instance.doc, [filtered]))
            found[ensemble.name] = {"filtered": filtered, "metrics": metrics}
    return found

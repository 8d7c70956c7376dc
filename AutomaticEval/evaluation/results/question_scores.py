"""What each question adds to each score, so that two runs can be paired by question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from AutomaticEval.evaluation.results.join import Score, leaves, main_metric

Questions = dict[tuple[str, int], float]
"""(task, document) -> the question's own value of a metric."""


def question_scores(
    scores: Sequence[Score], results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[tuple[str, str], Questions]:
    """(task or group, metric), as a line of the table of scores has them -> the questions whose mean the score is.

    Left out are scores that are no mean of their questions' values, such as a perplexity, or a group that weighs its tasks.
    """
    better = results.get("higher_is_better", {})
    by_task = {task: _by_metric(task, logged) for task, logged in samples.items()}
    found: dict[tuple[str, str], Questions] = {}
    for score in scores:
        if score.task in by_task:
            own = by_task[score.task].get(score.metric, {})
        elif score.task in results.get("groups", {}):
            own = _joined(by_task[task].get(score.metric, {}) for task in leaves(score.task, results["group_subtasks"]))
        else:
            own = _joined(_verdicts(task, logged, better.get(task)) for task, logged in samples.items())
        if own and math.isclose(sum(own.values()) / len(own), score.value, rel_tol=1e-9, abs_tol=1e-12):
            found[score.task, score.metric] = own
    return found


def _by_metric(task: str, logged: Sequence[Mapping[str, Any]]) -> dict[str, Questions]:
    """Metric, named as in a `Score` -> the questions' values. Metrics whose values are no numbers are left out."""
    found: dict[str, Questions] = {}
    for entry in logged:
        for name in entry["metrics"]:
            value = entry[name]
            if isinstance(value, int | float):
                shown = name if entry["filter"] == "none" else f"{name} ({entry['filter']})"
                found.setdefault(shown, {})[task, entry["doc_id"]] = float(value)
    return found


def _verdicts(task: str, logged: Sequence[Mapping[str, Any]], better: Mapping[str, Any] | None) -> Questions:
    main = main_metric(logged, better)
    if main is None:
        return {}
    first_last = {(task, entry["doc_id"]): float(entry[main]) for entry in reversed(logged)}  # the first filter's stays
    return dict(reversed(first_last.items()))


def _joined(parts: Any) -> Questions:
    return {key: value for part in parts for key, value in part.items()}

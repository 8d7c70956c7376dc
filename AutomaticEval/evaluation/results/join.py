"""What lm-eval said of each question, joined to what was captured of it, and the lines of the results table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.errors import CaptureError
from AutomaticEval.evaluation.results.earlier_answers import logprob_of, scored_text
from AutomaticEval.evaluation.results.repeats import Verdicts
from AutomaticEval.evaluation.results.request_key import RequestKey, key_of

VERDICTS = re.compile(
    r"(acc|accuracy|correct|exact|exact_match|em|acc_\w+|exact_match_\w+|prompt_level_(strict|loose)_acc|pass(@|_at_)1|math_verify|numerical_match)"
)
"""Names of metrics that say whether an answer is right. In other metrics 0 and 1 mean something else, even if no other values occur."""

Directions = Mapping[str, Mapping[str, Any]]
"""Task -> metric -> whether higher is better, as lm-eval's results say."""

NO_METRIC = "bypass"
"""What lm-eval writes, with the value 999, in the place of a metric that was not computed (predict_only)."""


class Score(NamedTuple):
    """One line of the results table."""

    task: str
    """The task, the group, or "all questions"."""

    metric: str
    value: float
    stderr: float | None
    chance: float | None
    """The accuracy of guessing among the choices; None where it is not known."""

    answered: int
    """Documents that were asked."""

    total: int
    """Documents that there are."""


def join(
    records: Sequence[Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    repeats: Verdicts | None = None,
    directions: Directions | None = None,
) -> list[dict[str, Any]]:
    """Each captured sample with what lm-eval logged for its request, in the order of (task, doc, choice, repeat, window).

    repeats: the verdict on each of several answers to one question; an answer that is not among them has no verdict.
    directions: a metric whose lower values are better gives no verdict.
    Raises CaptureError when a request was captured twice or not at all, or when its text is not what was logged.
    """
    captured = {key_of(record): dict(record) for record in records}
    if len(captured) != len(records):
        raise CaptureError(f"{len(records)} samples were captured for {len(captured)} requests.")
    joined = []
    for task, logged in samples.items():
        main = main_metric(logged, (directions or {}).get(task))
        for doc_id, entries in sorted(_by_document(logged).items()):
            verdict = _verdict(entries, main)
            for choice, responses in enumerate(entries[0]["resps"]):
                for repeat, response in enumerate(responses):
                    key = RequestKey(task, doc_id, choice, repeat)
                    own = _windows(captured, key)
                    _check(own, key, entries[0]["arguments"][choice], response)
                    alone: Mapping[str, Any] = verdict
                    if len(responses) > 1 and isinstance(response, str):
                        alone = _verdict_of_repeat(verdict, (repeats or {}).get(key), entries[0]["filter"], main)
                    joined += [{"logprob": None, "is_greedy": None, **record, **alone} for record in own]
    if captured:
        raise CaptureError(f"{len(captured)} captured samples have no logged request, first {next(iter(captured))}.")
    return joined


def _windows(captured: dict[RequestKey, dict[str, Any]], key: RequestKey) -> list[dict[str, Any]]:
    """Take out the samples of one request: one, or one a window when a whole text was scored in windows."""
    samples = []
    while key in captured:
        sample = captured.pop(key)
        sample.pop("random_state", None)  # only a run that is resumed needs it
        samples.append(sample)
        key = key._replace(window=key.window + 1)
    return samples


def _check(own: Sequence[Mapping[str, Any]], key: RequestKey, arguments: Sequence[Any], response: Any) -> None:
    """Raises CaptureError when what was captured of a request is not what lm-eval logged of it."""
    where = f"{key.task} document {key.doc_id} choice {key.choice} repeat {key.repeat}"
    if isinstance(response, int | float):  # a whole text
        if repr(sum(logprob_of(record) for record in own)) != repr(response):
            raise CaptureError(f"{where}: the captured windows do not sum up to the logged {response}.")
        return
    if len(own) != 1:
        raise CaptureError(f"no activations for {where}.")
    (record,) = own
    if record["prompt"] != arguments[0]:
        raise CaptureError(f"{where}: the captured prompt is not the logged one.")
    if isinstance(response, str):
        captured = scored_text(record)
        if captured != response:
            raise CaptureError(f"{where}: captured {captured!r}, logged {response!r}.")
    elif record["response"] != arguments[1]:
        raise CaptureError(f"{where}: the captured choice is not the logged one.")
    elif repr((logprob_of(record), record["is_greedy"])) != repr((float(response[0]), bool(response[1]))):
        raise CaptureError(f"{where}: captured {logprob_of(record)}, logged {response}.")


def _by_document(logged: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """doc_id -> the logged entries of the document, one a filter."""
    entries: dict[int, list[Mapping[str, Any]]] = {}
    for entry in logged:
        entries.setdefault(entry["doc_id"], []).append(entry)
    return entries


def main_metric(logged: Sequence[Mapping[str, Any]], higher_is_better: Mapping[str, Any] | None = None) -> str | None:
    """The first metric of a task that says whether an answer is right; None when none does.

    Such a metric has one of the names VERDICTS, higher values of it are not worse, and it is 0 or 1 for each document.
    """
    better = higher_is_better or {}
    names = [
        name
        for name in (logged[0]["metrics"] if logged else [])
        if VERDICTS.fullmatch(name) and better.get(name) is not False
    ]
    return next((name for name in names if all(_is_one_or_zero(entry.get(name)) for entry in logged)), None)


def _is_one_or_zero(value: Any) -> bool:
    return isinstance(value, int | float | np.generic) and value in (0, 1)


def _verdict(entries: Sequence[Mapping[str, Any]], main: str | None) -> dict[str, Any]:
    """The columns that lm-eval's entries for one document give, one entry a filter. `correct` is the main metric after the first filter."""
    first = entries[0]
    return {
        "target": first["target"],
        "prediction": _prediction(first, main),
        "metrics": {entry["filter"]: {name: entry[name] for name in entry["metrics"]} for entry in entries},
        "correct": None if main is None else bool(first[main]),
        "prompt_hash": first["prompt_hash"],
    }


def _verdict_of_repeat(
    verdict: Mapping[str, Any], alone: Mapping[str, Mapping[str, Any]] | None, first_filter: str, main: str | None
) -> Mapping[str, Any]:
    """The verdict on one of several answers to a question: its own or none, and never that on the question."""
    if alone is None:
        return {**verdict, "prediction": None, "correct": None}
    first = alone.get(first_filter, {"filtered": None, "metrics": {}})
    correct = first["metrics"].get(main)
    return {
        **verdict,
        "prediction": first["filtered"],
        "metrics": {name: each["metrics"] for name, each in alone.items()},
        "correct": bool(correct) if _is_one_or_zero(correct) else None,
    }


def _prediction(entry: Mapping[str, Any], main: str | None) -> Any:
    """The filtered answer, or the index of the likeliest choice.

    None for a single scored continuation, and where `correct` does not follow the likeliest choice (acc_norm).
    """
    answers = entry["filtered_resps"]
    if entry["arguments"] and isinstance(entry["arguments"][0][-1], dict):
        return answers[0]
    choices = _choices(entry)
    if len(choices) < 2 or main not in (None, "acc"):
        return None
    return max(choices, key=lambda choice: answers[choice][0])


def _choices(entry: Mapping[str, Any]) -> list[int]:
    """The numbers of the requests that score a choice. acc_mutual_info also scores each choice without a context."""
    contexts = [arguments[0] for arguments in entry["arguments"]]
    return [number for number, context in enumerate(contexts) if context or not contexts[0]]


def scores_of(
    results: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    totals: Mapping[str, int],
    n_questions: int,
) -> list[Score]:
    """The lines of the results table: every metric of each task and group, and the accuracy over all questions that have a verdict.

    totals: task or group -> its number of documents. n_questions: the documents of the whole benchmark.
    """
    answered = {task: len({entry["doc_id"] for entry in logged}) for task, logged in samples.items()}
    scores = []
    for task, logged in samples.items():
        for metric, value, stderr in _metrics(results["results"][task]):
            scores.append(Score(task, metric, value, stderr, _chance(metric, logged), answered[task], totals[task]))
    for group, values in results.get("groups", {}).items():
        asked = sum(answered[task] for task in leaves(group, results["group_subtasks"]))
        for metric, value, stderr in _metrics(values):
            scores.append(Score(group, metric, value, stderr, None, asked, totals[group]))
    if len(totals) > 1:
        n_judged = n_questions - sum(totals[task] for task in without_verdict(results, samples))
        scores += _overall(results, samples, n_judged)
    return scores


def without_verdict(results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The tasks without a metric that says whether an answer is right."""
    better = results.get("higher_is_better", {})
    return [task for task, logged in samples.items() if main_metric(logged, better.get(task)) is None]


def _metrics(values: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """(metric, value, standard error) of each metric, from lm-eval's {"acc,none": 0.5, "acc_stderr,none": 0.1, …}."""
    metrics = []
    for name, value in values.items():
        metric, _, filtered = name.partition(",")
        if filtered and metric != NO_METRIC and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics.append((shown, float(value), stderr if isinstance(stderr, float) else None))
    return metrics


def leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group, however deep."""
    return [leaf for child in subtasks[name] for leaf in leaves(child, subtasks)] if name in subtasks else [name]


def _chance(metric: str, logged: Sequence[Mapping[str, Any]]) -> float | None:
    """Accuracy of guessing among the choices."""
    n_choices = [len(_choices(entry)) for entry in logged]
    if not metric.startswith("acc") or min(n_choices, default=0) < 2:
        return None
    return sum(1 / n for n in n_choices) / len(n_choices)


def _overall(
    results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]], n_questions: int
) -> list[Score]:
    """The share of right answers among all questions that have a verdict, over all tasks."""
    verdicts = []
    for task, logged in samples.items():
        main = main_metric(logged, results.get("higher_is_better", {}).get(task))
        if main is not None:
            verdicts += [bool(entries[0][main]) for entries in _by_document(logged).values()]
    if not verdicts:
        return []
    return [Score("all questions", "correct", sum(verdicts) / len(verdicts), None, None, len(verdicts), n_questions)]

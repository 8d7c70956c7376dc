"""The scores of a run by task, with intervals, and what became of them in a second run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from AutomaticEval.analysis.compare_runs import TaskChange, shared_questions, task_changes
from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.result import Estimate
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.run import Run

Key = tuple[Any, Any, Any]
"""Task, document (or the question's text) and repeat: what makes a question the same in two runs."""


EVERY = "all"
"""The name of the line of all tasks."""


class TaskScore(NamedTuple):
    """The share of a task's questions that were answered rightly."""

    task: str
    n: int
    """Questions with a verdict."""

    n_without: int
    """Questions without one."""

    correct: Estimate
    """Over documents: several answers to one count as one value."""


class Second(NamedTuple):
    """A second run over the same questions."""

    changes: Sequence[TaskChange]
    answers: Mapping[Key, tuple[bool | None, Any]]
    """Question -> its verdict and prediction there."""

    n_only_first: int
    n_only_second: int


def scores_of(questions: Questions) -> list[TaskScore]:
    """Each task by name, and then all of them when there are several."""
    by_task: dict[str, list[tuple[Hashable, bool | None]]] = {}
    for (task, doc, _), correct in zip(keys_of(questions), questions.column("correct"), strict=True):
        by_task.setdefault(str(task or ""), []).append(((task, doc), correct))
    scores = [_score(task, said) for task, said in sorted(by_task.items())]
    if len(scores) > 1:
        scores.append(_score(EVERY, [each for said in by_task.values() for each in said]))
    return scores


def _score(task: str, said: Sequence[tuple[Hashable, bool | None]]) -> TaskScore:
    documents: dict[Hashable, list[float]] = {}
    for document, correct in said:
        if correct is not None:
            documents.setdefault(document, []).append(float(correct))
    n = sum(map(len, documents.values()))
    means = [sum(each) / len(each) for each in documents.values()]
    return TaskScore(task, n, len(said) - n, mean_interval(means))


def second_of(first: Run, second: Run) -> Second:
    """What a second run says of the first one's questions. Raises StoreError for runs that share no question."""
    one, other, alone = shared_questions(first, second)
    changes = task_changes(list(zip(one, other, strict=True)))
    said = zip(other.column("correct"), other.column("prediction"), strict=True)
    return Second(changes, dict(zip(keys_of(other), said, strict=True)), *alone)


def keys_of(questions: Questions) -> list[Key]:
    """What identifies each question in another run: task, document and repeat; without a document, its text."""
    names = map(questions.column, ("task", "doc_id", "repeat", "question"))
    return [(task, text if doc is None else doc, repeat) for task, doc, repeat, text in zip(*names, strict=True)]

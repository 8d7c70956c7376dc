"""What a probe is to tell: two classes of questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.store.questions.questions import Questions

Array = np.ndarray[Any, Any]
COLUMNS = {"answer": "target"}
"""Names of targets that are not those of columns. `answer` is the right answer, also where the model took another."""
SHOWN = 8


@dataclass(frozen=True)
class Target:
    """The questions that have a value, and in which of two classes each of them is."""

    name: str
    questions: Questions
    labels: Array
    """[n_questions], 0 or 1."""

    positive: str
    """What the questions with label 1 are: `true`, or a value of the column."""

    negative: str
    n_left_out: int
    """Questions without a value."""


def target_of(questions: Questions, name: str = "correct", positive: Any = None) -> Target:
    """The classes of a target: `correct`, `answer`, `task` or a column of questions.

    positive: the value that is told from all others. Needed for a column of more than two values; of two, it is true, or the last in order.
    Raises StoreError for an unknown column, and for a target with one class; SelectionError for one with more than two, and for a value that
    no question has.
    """
    values = questions.column(COLUMNS.get(name, name))
    known = [number for number, value in enumerate(values) if value is not None]
    words = [word_of(values[number]) for number in known]
    counted = Counter(words)
    if len(counted) < 2:
        only = f"all {len(words)} have {words[0]}" if words else "none has a value"
        raise StoreError(
            f"{questions.source.path}: a probe for {name} needs questions of two classes, and {only}. Ask questions of both classes (at least 5 "
            f"of each for 5 folds), or take another target: correct, answer, task or a column of questions."
        )
    shown = ", ".join(f"{word} ({n})" for word, n in counted.most_common(SHOWN)) + (
        " …" if len(counted) > SHOWN else ""
    )
    if positive is None and len(counted) > 2:
        raise SelectionError(
            f"{name} has {len(counted)} values, and a probe tells two classes apart. Name one of them, which is told from all others "
            f"(positive=…, --positive): {shown}."
        )
    wanted = max(counted) if positive is None else word_of(positive)
    if wanted not in counted:
        raise SelectionError(f"no question has the {name} {wanted}; there are {shown}.")
    others = sorted(set(counted) - {wanted})
    labels = np.array([int(word == wanted) for word in words])
    return Target(
        name,
        questions.take(known),
        labels,
        wanted,
        others[0] if len(others) == 1 else f"the other {len(others)}",
        len(values) - len(known),
    )


def word_of(value: Any) -> str:
    """A value as it is written: true and false in small letters, as in JSON."""
    return str(bool(value)).lower() if isinstance(value, bool | np.bool_) else str(value)

"""What a probe is to tell: two classes of questions, or several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.several.sides import MOST_CLASSES
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.store.questions.questions import Questions

Array = np.ndarray[Any, Any]
COLUMNS = {"answer": "target"}
"""Names of targets that are not those of columns. `answer` is the right answer, also where the model took another."""
SHOWN = 8
NAME_ONE = "Name the value that is told from all others (positive=…, --positive)"


@dataclass(frozen=True)
class Target:
    """The questions that have a value, and in which class each of them is."""

    name: str
    questions: Questions
    labels: Array
    """[n_questions]: the number of each question's class."""

    classes: Sequence[str]
    """What the questions of each class have: `true`, or a value of the column."""

    n_left_out: int
    """Questions without a value."""

    @property
    def is_several(self) -> bool:
        """Whether there are more than two classes, each of which is told from the rest."""
        return len(self.classes) > 2

    @property
    def positive(self) -> str:
        """Of two classes: what the questions with label 1 are."""
        return self.classes[1]

    @property
    def negative(self) -> str:
        """Of two classes: what the questions with label 0 are."""
        return self.classes[0]

    @property
    def counts(self) -> dict[str, int]:
        """Class -> how many questions are of it."""
        return dict(zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)).tolist(), strict=True))

    def about(self, n_groups: int) -> dict[str, Any]:
        """What a result says of the classes. n_groups: of equal prompts, or tasks."""
        names = ("positive", "negative", "n_positive", "n_negative")
        (negative, n_negative), (positive, n_positive), *more = self.counts.items()
        values = (positive, negative, n_positive, n_negative)
        of_two = dict.fromkeys(names) if more else dict(zip(names, values, strict=True))
        told = {"target": self.name, **of_two, "n_left_out": self.n_left_out, "n_groups": n_groups}
        return {**told, **({"counts": self.counts} if more else {})}


def target_of(questions: Questions, name: str = "correct", positive: Any = None) -> Target:
    """The classes of a target: `correct`, `answer`, `task` or a column of questions.

    positive: the value that is told from all others. Without it, a column of more than two values has a class for each; of two, the positive one is true, or the
    last in order. Raises StoreError for an unknown column, and for a target with one class; SelectionError for one with more than MOST_CLASSES, for numbers and
    texts that are no classes, and for a value that no question has.
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
    if positive is None:
        _refuse_no_class(name, [values[number] for number in known], len(counted))
    if positive is None and len(counted) > MOST_CLASSES:
        several = len(set(questions.column("task"))) > 1 and name != "task"
        one_task = ", or take one task (run.where(task=…), --task)" if several else ""
        raise SelectionError(
            f"{name} has {len(counted)} values, and a probe tells at most {MOST_CLASSES} classes apart. {NAME_ONE}{one_task}: {told(counted)}."
        )
    classes = _in_order(counted) if positive is None else _two(counted, name, word_of(positive))
    numbers = {word: number for number, word in enumerate(classes)}
    labels = np.array([numbers.get(word, 0) for word in words])
    return Target(name, questions.take(known), labels, classes, len(values) - len(known))


def _refuse_no_class(name: str, values: Sequence[Any], n_different: int) -> None:
    """Raises SelectionError for numbers that are no whole ones, and for texts of which few are equal."""
    is_number = any(isinstance(each, float) for each in values) and n_different > 2
    is_text = all(isinstance(each, str) for each in values) and n_different > max(MOST_CLASSES, len(values) / 2)
    if is_number or is_text:
        raise SelectionError(
            f"{name} is a {'number' if is_number else 'text'} with {n_different} values in {len(values)} questions, and no class. Take a target with few values: correct, "
            "answer, task or a column of questions."
        )


def _in_order(counted: Mapping[str, int]) -> list[str]:
    """Values in their order; whole numbers in that of numbers."""
    return sorted(counted, key=int) if all(map(str.isdecimal, counted)) and len(counted) > 2 else sorted(counted)


def _two(counted: Mapping[str, int], name: str, wanted: str) -> list[str]:
    """A value after the other one, or after what stands for all others."""
    if wanted not in counted:
        raise SelectionError(f"no question has the {name} {wanted}; there are {told(counted)}.")
    others = sorted(set(counted) - {wanted})
    return [others[0] if len(others) == 1 else f"the other {len(others)}", wanted]


def told(counted: Mapping[str, int]) -> str:
    """`2 (31), 0 (25), …`: the most frequent first."""
    frequent = Counter(counted).most_common(SHOWN)
    return ", ".join(f"{word} ({n})" for word, n in frequent) + (" …" if len(counted) > SHOWN else "")


def refuse_several(of: Target, what: str) -> None:
    """Raises SelectionError for more than two classes. what: is of two, for the message."""
    if of.is_several:
        raise SelectionError(
            f"{what} is of two classes, and {of.name} has {len(of.classes)}. {NAME_ONE}: {told(of.counts)}."
        )


def refuse_rare(of: Target, units: Array, unit: str, n_folds: int) -> None:
    """Raises StoreError for several classes of which some are in fewer units than there are folds. units: [n_questions]; unit: what they are, for the message."""
    n_units = {word: len(np.unique(units[of.labels == number])) for number, word in enumerate(of.classes)}
    rare = {word: n for word, n in n_units.items() if n < n_folds}
    if of.is_several and rare:
        raise StoreError(
            f"{of.name} has {len(of.classes)} values, and these are of fewer than {n_folds} {unit}, which {n_folds} folds need of each: {told(rare)}. Use fewer folds, "
            f"leave these questions out (run.where({COLUMNS.get(of.name, of.name)}=[…])), or ask more. {NAME_ONE} for one of them alone."
        )


def word_of(value: Any) -> str:
    """A value as it is written: true and false in small letters, as in JSON."""
    return str(bool(value)).lower() if isinstance(value, bool | np.bool_) else str(value)

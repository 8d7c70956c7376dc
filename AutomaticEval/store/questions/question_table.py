"""Which samples of a run are one question, and the values of every question, made when they are asked for."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from AutomaticEval.errors import StoreError
from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.questions.question import FIELDS
from AutomaticEval.store.ragged import Array, Ragged


class QuestionTable:
    """A table with one row a question, made from the table with one row a sample.

    path: of the run, for messages. columns: of all its samples. Raises StoreError for a run of texts, and for one that lacks choices.
    """

    def __init__(self, path: Path, columns: Columns, n_samples: int) -> None:
        self._columns = columns
        self.samples = _questions(path, columns, n_samples)
        """[n_choices] for each question: the numbers of its samples, in ascending order of choice and window."""

    def __len__(self) -> int:
        return len(self.samples.offset) - 1

    @property
    def first(self) -> Array:
        """[n_questions]: the sample of each question's first choice, or of its answer."""
        first: Array = self.samples.values[self.samples.offset[:-1]]
        return first

    @property
    def names(self) -> list[str]:
        return list(FIELDS)

    def whole(self, name: str) -> list[Any]:
        field = FIELDS[name]
        columns = {each: self._columns.whole(each) for each in field.columns if each in self._columns.names}
        offset, numbers = self.samples.offset.tolist(), self.samples.values.tolist()
        return [
            field.of([{each: values[n] for each, values in columns.items()} for n in numbers[start:stop]])
            for start, stop in pairwise(offset)
        ]

    def record(self, index: int) -> dict[str, Any]:
        samples = [self._columns.record(number) for number in self.samples.item(index).tolist()]
        return {name: field.of(samples) for name, field in FIELDS.items()}


def _questions(path: Path, columns: Columns, n_samples: int) -> Ragged:
    names = columns.names
    if "choice" not in names and "window" in names:
        raise StoreError(
            f"{path} holds texts, not questions; read it with run.table(), run.activations(key) or run.rows(key)."
        )
    task, doc, repeat, choice, window = (
        columns.whole(name) if name in names else [None] * n_samples
        for name in ("task", "doc_id", "repeat", "choice", "window")
    )
    found: dict[Hashable, list[int]] = {}
    for number in range(n_samples):
        key = number if doc[number] is None else (task[number], doc[number], repeat[number])
        found.setdefault(key, []).append(number)
    empty = _without_prompt(columns, choice)
    for numbers in found.values():
        if any(not choice[number] and number not in empty for number in numbers):  # acc_mutual_info: choices alone
            numbers[:] = [number for number in numbers if number not in empty]
        numbers.sort(key=lambda number: (choice[number] or 0, window[number] or 0))
        if sorted({choice[number] or 0 for number in numbers}) != list(range(1 + (choice[numbers[-1]] or 0))):
            first = numbers[0]
            raise StoreError(
                f"{path} lacks choices of {task[first]} document {doc[first]}; it has {[choice[n] for n in numbers]}. Open the whole run."
            )
    return Ragged.of(list(found.values()))


def _without_prompt(columns: Columns, choice: Sequence[int | None]) -> set[int]:
    """The samples whose prompt is empty, and has one token at most; none, when no choice after the first has such a prompt.

    acc_mutual_info scores each choice with its question and without. In other tasks (BLiMP) no choice has a prompt.
    """
    if not {"prompt", "n_prompt_tokens"} <= set(columns.names):
        return set()
    lengths = columns.whole("n_prompt_tokens")
    short = [number for number, length in enumerate(lengths) if length is not None and length <= 1]
    prompts = columns.whole("prompt") if any(choice[number] for number in short) else []
    if not prompts:
        return set()
    return {number for number in short if not prompts[number]}

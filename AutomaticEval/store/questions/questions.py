"""`Questions`: the questions of a run as a lazy sequence, with one row of activations each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pandas as pd
from torch import Tensor

from AutomaticEval.errors import StoreError
from AutomaticEval.safe_text import html_lines, html_text
from AutomaticEval.selection import Positions
from AutomaticEval.store.contents.columns import Ordered
from AutomaticEval.store.contents.thinking_in import ThinkingIn
from AutomaticEval.store.questions.prompt_tokens import PromptTokens
from AutomaticEval.store.questions.question import Question
from AutomaticEval.store.questions.question_table import QuestionTable
from AutomaticEval.store.questions.response_tokens import (
    NONE,
    OF_RESPONSE,
    ResponseToken,
    positions_in_response,
)
from AutomaticEval.store.questions.shared_prompts import SharedPrompts, shared_prompts
from AutomaticEval.store.questions.source import Source
from AutomaticEval.store.ragged import Array, Ragged
from AutomaticEval.store.reading.row_numbers import row_numbers, rows_at, stored_at
from AutomaticEval.store.reading.table_queries import column_of, pandas_table, selected, whole_number
from AutomaticEval.store.row_array import RowArray, RowsDataset
from AutomaticEval.thinking.where import Thinking

AT = "prompt[-1]"
SHOWN = 10
"""So many questions are shown in a notebook."""


class Questions(Sequence[Question]):
    """The questions of a run, one row each: `Question` says what it holds. Nothing is read before it is asked for."""

    def __init__(self, source: Source, selected_samples: Array) -> None:
        """selected_samples: numbers of samples; the questions that they belong to are here, in the order of these samples."""
        self._source = source
        self._table = QuestionTable(source.path, source.contents.columns, source.contents.n_samples)
        owner = np.full(source.contents.n_samples, -1)
        owner[self._table.samples.values] = np.repeat(np.arange(len(self._table)), np.diff(self._table.samples.offset))
        asked = owner[selected_samples]
        self._order: Array = np.array(list(dict.fromkeys(asked[asked >= 0].tolist())), dtype=np.int64)
        self._row_numbers: dict[str | int, Array] = {}
        self._positions: dict[str, Array] = {}

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Questions: ...
    def __getitem__(self, index: int | slice) -> Question | Questions:
        """One question, or the questions of a slice."""
        if isinstance(index, slice):
            return self._some(self._order[index])
        number = whole_number(
            index,
            "questions",
            'a column is questions.column("correct"), the rows of a site questions.activations("layer_3")',
        )
        return self._question(number, self._columns.record(number))

    def __iter__(self) -> Iterator[Question]:
        """Every question. The columns are read once, as for `table`."""
        names = self._table.names
        for number, values in enumerate(zip(*(self._columns.whole(name) for name in names), strict=True)):
            yield self._question(number, dict(zip(names, values, strict=True)))

    def _question(self, number: int, record: dict[str, Any]) -> Question:
        first_sample = int(self._table.first[self._order[number]])
        return Question(**record, tokens=PromptTokens(self._source, first_sample))

    @property
    def source(self) -> Source:
        """The run that the questions are of, with its model and settings in `contents`."""
        return self._source

    @property
    def first_samples(self) -> Array:
        """[n_questions]: the number, in the whole run, of the sample with each question's first choice, or with its answer."""
        first: Array = self._table.first[self._order]
        return first

    @property
    def _columns(self) -> Ordered:
        return Ordered(self._table, self._order)

    def _some(self, order: Array) -> Questions:
        some = copy.copy(self)
        some._order, some._row_numbers, some._positions = order, {}, {}
        return some

    def take(self, numbers: Sequence[int]) -> Questions:
        """The questions with these numbers, in this order."""
        return self._some(self._order[np.asarray(numbers, dtype=np.int64)])

    def table(self) -> pd.DataFrame:
        """One row a question, with the values of `Question` as columns."""
        return pandas_table(self._columns)

    def column(self, name: str) -> list[Any]:
        """One column of the table: a list of n_questions values. Raises StoreError for a column that there is not."""
        return column_of(self._columns, name, self._source.path)

    def where(self, mask: Any = None, **wanted: Any) -> Questions:
        """The questions whose values are these, as in `Run.where`: `questions.where(correct=False, task="mmlu_anatomy")`.

        Raises StoreError for a value that questions do not have, for a task that the run does not have, and for a mask of another length.
        """
        return self._some(self._order[selected(self._columns, self._table, self._source.path, mask, wanted)])

    @cached_property
    def _prompts(self) -> SharedPrompts:
        return shared_prompts(self._source.contents, self._table.samples)

    @property
    def groups(self) -> Array:
        """[n_questions], int: equal prompts have the same number, so that a split by groups has no prompt in both parts.

        For scikit-learn's GroupKFold and the like. Prompts are compared by their tokens; of choices with prompts of their own, by the
        tokens with which all of them begin. The answers to one question, and a question that is asked twice, are one group.
        """
        groups: Array = self._prompts.groups[self._order]
        return groups

    @property
    def samples(self) -> Ragged:
        """[n_choices] for each question: the numbers of its samples in `source.contents`, in ascending order of choice and window."""
        return self._table.samples.take(self._order)

    @property
    def n_prompt_tokens(self) -> Array:
        """[n_questions]: with how many tokens all prompts of the question's choices begin."""
        n_tokens: Array = self._prompts.n_tokens[self._order]
        return n_tokens

    def activations(self, key: str, position: str | int = AT) -> Tensor:
        """One row of every question: [n_questions, width], in the order of the questions.

        key: one of the run's keys, in any spelling of the site. position: "prompt[-1]", the last token of the question, which all choices
        share, read in the forward of the first choice. It comes before every choice and before the generated answer, so that the row knows
        nothing of their text. "prompt[-3]" and the like are other tokens of the prompt. If each choice has a prompt of its own (WinoGrande),
        the prompt is the tokens with which all of them begin, without the beginning of a word that differs.
        Runs with positions="scored", "all" or "prompt[-1:]" have this row; for choices with prompts of their own, "all" is needed.
        Where no question has several choices: "response[0]", "answer[0]", "exact_answer[-1]" and the like are tokens of the response (docs/runs.md
        has all spellings); "last" and numbers are as in `Run.activations`.
        Raises StoreError for an unknown key, for a position that the run did not keep, and for one within a choice.
        """
        return self._rows(key, position)[:]

    def dataset(self, key: str, position: str | int = AT, label: str | None = None) -> RowsDataset:
        """A torch Dataset with one row of every question, for a DataLoader. key and position: as for `activations`.

        label: a column; each item is then (row, the question's value). Raises StoreError as `activations`, and for a question without that label.
        """
        labels = None if label is None else self.column(label)
        return RowsDataset.labelled(self._rows(key, position), labels, label, "question")

    def _rows(self, key: str, position: str | int) -> RowArray:
        key = self._source.key(key)
        return self._source.rows(key, self.row_numbers(position))

    def row_numbers(self, position: str | int = AT) -> Array:
        """[n_questions]: the number of each question's row at a position, as `activations` reads it; `source.rows(key, numbers)` reads them.

        Raises StoreError for a position that the run did not keep, and for one within a choice.
        """
        if position not in self._row_numbers:
            self._row_numbers[position] = self._found_rows(position)
        return self._row_numbers[position]

    def _found_rows(self, position: str | int) -> Array:
        source, first = self._source, self.first_samples
        if ResponseToken.parse(position) is not None:
            self._refuse_choices(position)
            wanted = self.positions(str(position))
            self._refuse_without(wanted, position)
            return rows_at(source.path, source.contents, first, wanted, str(position))
        parsed = _parsed(position)
        if parsed is None or parsed.part != "prompt":
            self._refuse_choices(position)
            return row_numbers(source.path, source.contents, first, position)
        wanted = np.full(len(first), NONE)
        for number, n_tokens in enumerate(self._prompts.n_tokens[self._order].tolist()):
            places = parsed.resolve(n_tokens, 1)
            if len(places) != 1:
                raise StoreError(
                    f"{parsed} are {len(places)} positions of {self[number].name}, whose prompt has {n_tokens} tokens that all choices share; ask "
                    f'for one that each question has: "{AT}".'
                )
            wanted[number] = places[0]
        return rows_at(source.path, source.contents, first, wanted, str(position))

    def positions(self, position: str) -> Array:
        """[n_questions]: where in its sequence a question's token is, whether or not the run kept its row; -1 where it has no such token that was fed.

        position: of the prompt or the response, as in `activations`. Raises UnknownPositions.
        """
        if position not in self._positions:
            self._positions[position] = self._found_positions(position)
        return self._positions[position]

    def _found_positions(self, position: str) -> Array:
        token, contents = ResponseToken.parse(position), self._source.contents
        if token is not None:
            columns = [self.column(name) for name in OF_RESPONSE]
            return positions_in_response(contents, self.first_samples, columns, token)
        parsed = Positions.parse(position)
        lengths = (np.diff(ids.offset)[self.first_samples] for ids in (contents.input_ids, contents.generated_ids))
        n_prompt, n_response = (each.tolist() for each in lengths)
        if parsed.part == "prompt":
            n_prompt, n_response = self.n_prompt_tokens.tolist(), [1] * len(self)
        else:
            has_choices = [bool(each) for each in self.column("logprobs")]
            n_response = [0 if has else n for has, n in zip(has_choices, n_response, strict=True)]
            n_prompt = [0 if has else n for has, n in zip(has_choices, n_prompt, strict=True)]
        told: list[Thinking | None] = [None] * len(self)
        if parsed.needs_thinking:
            thinking = ThinkingIn(contents)
            told = [thinking.of(number) for number in self.first_samples.tolist()]
        places = map(parsed.resolve, n_prompt, n_response, told)
        return np.array([each[0] if len(each) == 1 else NONE for each in places], dtype=np.int64)

    def has(self, position: str) -> Array:
        """[n_questions], bool: whether the run has a question's row at a position; `run.where(questions.has("exact_answer[-1]"))` are those of generated answers that have it.

        position: as in `positions`. Raises UnknownPositions.
        """
        wanted = self.positions(position)
        there: Array = (stored_at(self._source.contents, self.first_samples, wanted) >= 0) & (wanted >= 0)
        return there

    def _refuse_without(self, wanted: Array, position: str | int) -> None:
        missing = np.flatnonzero(wanted == NONE)
        if len(missing):
            raise StoreError(
                f"{self._source.path}: {len(missing)} of {len(self)} questions have no {position} that was fed, the first of them {self[int(missing[0])].name}. Take those "
                f"that have one: run.where(run.questions().has({position!r}))."
            )

    def _refuse_choices(self, position: str | int) -> None:
        several = np.flatnonzero(np.array([len(each) > 1 for each in self.column("logprobs")], dtype=bool))
        if len(several):
            raise StoreError(
                f"{self[int(several[0])].name} has choices, and {position!r} is another token in each, or inside its text. Ask "
                f'for a token of the prompt, such as "{AT}", or read the rows of each choice: run.activations(key, position={position!r}).'
            )

    def __repr__(self) -> str:
        return f"<Questions of {self._source.path}: {len(self)}>"

    def _repr_html_(self) -> str:
        """For notebooks: the first questions, with what the model took and the verdict."""
        shown = [
            (each.name, each.question[-80:], str(each.response), _right_answer(each), each.verdict)
            for each in (self[number] for number in range(min(len(self), SHOWN)))
        ]
        more = f"<p>… and {len(self) - SHOWN} more; table() has all.</p>" if len(self) > SHOWN else ""
        title = f"<p><b>{len(self)} questions of {html_text(str(self._source.path))}</b></p>"
        return title + html_lines(("", "Question (its end)", "Answer", "Right answer", ""), shown) + more


def _parsed(position: str | int) -> Positions | None:
    """None for a row that is counted among the stored ones."""
    return Positions.parse(position) if isinstance(position, str) and position not in ("first", "last") else None


def _right_answer(question: Question) -> str:
    """The text of the target, where that is the number of a choice."""
    is_choice = isinstance(question.target, int) and 0 <= question.target < len(question.choices)
    return question.choices[question.target] if is_choice else str(question.target)

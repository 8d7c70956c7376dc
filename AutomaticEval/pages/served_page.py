"""`served_page`: the page of a run from a server on this machine, which reads the rows of a question when it is chosen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from AutomaticEval.pages.lens_result import LensQuestions
from AutomaticEval.pages.prompt_rows import MOST_TOKENS, Measure, prompt_rows, ranks_by, shown_keys
from AutomaticEval.pages.question_rows import row_of
from AutomaticEval.pages.result_files import Found, results_of
from AutomaticEval.pages.run_page import run_page
from AutomaticEval.pages.scores import keys_of
from AutomaticEval.report.page.local_server import LocalServer
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.run import Run

if TYPE_CHECKING:
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

MOST_NUMBERS = 1_000_000
"""So many numbers of one question are sent."""
MOST_NORMS = 20_000
"""Of so many tokens of one prompt, its last, the norms are sent; ranks, which take the model, of as many as a file has."""
MOST_CHARACTERS = 2_000_000
"""So long may one prompt be that is sent whole."""
ASKED = re.compile(r"(rows|texts)/([0-9]{1,9})")


def served_page(
    run: Run, second: Run | None = None, results: Sequence[Path] | Found = (), loaded: LoadedModel | None = None
) -> LocalServer:
    """A server with the page that `run_page` makes, for the same arguments. It has an address, and answers once it runs.

    The page holds no rows; those of the chosen question are read when it is chosen, of any question and at every token, and so are whole texts.
    """
    found = results if isinstance(results, Found) else results_of(run, results)
    page = run_page(run, second, found, loaded, is_served=True)
    questions = run.questions()
    lens = None if found.lens is None else LensQuestions(found.lens.file, keys_of(questions))
    keys = shown_keys(run.keys, of_lens=loaded is not None)
    return LocalServer(page, ChosenQuestions(questions, keys, lens, None if loaded is None else ranks_by(loaded)))


class ChosenQuestions:
    """What a served page asks about the chosen question: `rows/3`, and `texts/3`. One question is read at a time."""

    def __init__(
        self, questions: Questions, keys: Sequence[str], lens: LensQuestions | None, measure: Measure | None
    ) -> None:
        self._questions, self._lens, self._measure = questions, lens, measure
        self._keys = [] if questions.source.contents.is_by_sample else keys
        self._reading = Lock()

    def __call__(self, asked: str) -> dict[str, Any] | None:
        match = ASKED.fullmatch(asked)
        if match is None or int(match[2]) >= len(self._questions):
            return None
        with self._reading:
            return self._rows(int(match[2])) if match[1] == "rows" else self._texts(int(match[2]))

    def _rows(self, number: int) -> dict[str, Any]:
        """tokens: as a page holds them, or None; lens: the choices by place, or None."""
        lens = None if self._lens is None else self._lens.of(number)
        if not self._keys:
            return {"tokens": None, "lens": lens}
        most = MOST_TOKENS if self._measure else max(MOST_TOKENS, min(MOST_NORMS, MOST_NUMBERS // len(self._keys)))
        held = prompt_rows(self._questions, [number], self._keys, self._measure, most)[number]
        return {"tokens": held if held["tokens"] else None, "lens": lens}

    def _texts(self, number: int) -> dict[str, Any]:
        """The question with its whole texts."""
        question = self._questions[number]
        sample = int(self._questions.first_samples[number])
        prompt = self._questions.source.contents.columns.record(sample).get("prompt")
        return row_of(question, question.question if prompt is None else prompt, MOST_CHARACTERS)

"""`run_report` and `show`: the page of a run, and one question of it, inside a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from AutomaticEval.errors import SelectionError
from AutomaticEval.pages.prompt_rows import prompt_rows, shown_keys
from AutomaticEval.pages.question_rows import LONGEST, prompts_of, row_of
from AutomaticEval.pages.result_files import usual_results
from AutomaticEval.pages.run_page import run_page
from AutomaticEval.report.page.document import ONE_QUESTION, check_html, document, write_html
from AutomaticEval.safe_text import shown
from AutomaticEval.store.disk.whole_files import size_text
from AutomaticEval.store.questions.prompt_tokens import PromptTokens
from AutomaticEval.store.questions.question import Question
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.reader import as_run
from AutomaticEval.store.run import Run


class InlinePage:
    """A page that a notebook shows where it is the last value of a cell, and that `save` writes as a file."""

    def __init__(self, html: str, about: str, height: int) -> None:
        self.html = html
        """The page, with all that it needs."""
        self._about, self._height = about, height

    def save(self, path: str | Path) -> Path:
        """Write the page as one .html file. Returns its path. Raises PathExists, SelectionError for another ending, FolderNotWritable, DiskFull."""
        path = Path(path).expanduser()
        check_html(path)
        write_html(path, self.html)
        return path

    def _repr_html_(self) -> str:
        """The page in a frame of its own origin: nothing of it reaches the notebook."""
        size = f"width:100%;height:{self._height}px;border:0"
        return f'<iframe sandbox="allow-scripts" title="{escape(self._about)}" style="{size}" srcdoc="{escape(self.html)}"></iframe>'

    def __repr__(self) -> str:
        return f'<Page of {self._about}: {size_text(len(self.html.encode()))}; save("report.html") writes it>'


def run_report(
    run: Run | str | Path,
    second: Run | str | Path | None = None,
    *,
    results: str | Path | Sequence[str | Path] | None = None,
) -> InlinePage:
    """The page that `main.py report RUN` writes, shown in a notebook: scores, probe, lens, every question, and how the run was made.

    run: open, or its path. second: a run over the same questions, for what changed. results: a file or folder with results of `probe` and `lens`, or
    several; by default the folder `results`, where there is one. `save("report.html")` writes the page. It is as large as the file, and so is then the notebook.
    Raises StoreError for a run without questions, for runs that share none, and for a path that is not there.
    """
    opened, other = as_run(run), None if second is None else as_run(second)
    several = [results] if isinstance(results, str | Path) else results
    given = usual_results() if several is None else [Path(each).expanduser() for each in several]
    return InlinePage(run_page(opened, other, given), shown(opened.path.name), 860)


def show(question: Question) -> InlinePage:
    """One question as the page of its run shows it: tokens of the prompt by the norm of their rows at each place, choices, prompt, response.

    question: `run.questions()[0]`. Of a copy, or of one that was pickled, which does not hold its run, no tokens are shown.
    Raises SelectionError for anything else.
    """
    if not isinstance(question, Question):
        raise SelectionError(f"show takes one question, such as run.questions()[0]; found {type(question).__name__}.")
    prompt, keys, tokens = question.question, [], {}
    if isinstance(question.tokens, PromptTokens):
        source, sample = question.tokens.source, question.tokens.sample
        alone = Questions(source, np.array([sample]))
        (prompt,) = prompts_of(alone)
        keys = [] if source.contents.is_by_sample else shown_keys(source.keys)
        tokens = {0: held} if keys and (held := prompt_rows(alone, [0], keys)[0])["tokens"] else {}
    questions = {"rows": [row_of(question, prompt, LONGEST)], "beginnings": {}, "hasSecond": False, "lens": {}}
    measured = {"keys": keys, "tokens": tokens, "measure": "norm", "isRank": False, "isServed": False}
    told = {"tokensTold": "There are no rows of the tokens of this prompt."}
    name = shown(question.name)
    return InlinePage(document({"title": name}, {**questions, **measured, **told}, ONE_QUESTION), name, 640)

"""`run_page`: a run, another one and their results as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from AutomaticEval.errors import StoreError
from AutomaticEval.pages.lens_result import choices_by_layer, lens_lines, lens_places
from AutomaticEval.pages.probe_result import probe_section, said
from AutomaticEval.pages.prompt_rows import prompt_rows, ranks_by, sampled, shown_keys
from AutomaticEval.pages.question_rows import question_rows
from AutomaticEval.pages.result_files import Found, results_of
from AutomaticEval.pages.scores import EVERY, Second, TaskScore, keys_of, scores_of, second_of
from AutomaticEval.report.page.charts import intervals_chart, lines_chart
from AutomaticEval.report.page.document import document
from AutomaticEval.safe_text import shown
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.reading.overview import facts_of
from AutomaticEval.store.run import Run

if TYPE_CHECKING:
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

ALONE = "This file holds all that it shows and asks the network for nothing."
SERVED = "It asks only the program that serves it, on the same machine, for the chosen question."
READING = "The rows are being read."
NUMBERS = ("confidence", "margin", "tokenProbability")
"""Numbers of questions. Each has a column where a question has it."""
MOST_BESIDE = 2
"""With more columns, the chosen question stands below the table on screens of middle size."""
LENS_COLUMNS = (
    "Place",
    "Median rank",
    "Right choice likeliest",
    "Right token likeliest",
    "p(right token)",
    "p(answer's token)",
    "Entropy, nats",
    "KL, nats",
)


def run_page(
    run: Run,
    second: Run | None = None,
    results: Sequence[Path] | Found = (),
    loaded: LoadedModel | None = None,
    *,
    is_served: bool = False,
) -> str:
    """The HTML of a page about a run: scores, probe, lens, every question, and how it was made.

    second: a run over the same questions, for what changed. results: files and folders with results of `probe` and `lens`, or what was found in them; those of other
    runs are left out, and the page says so. loaded: the run's model; with it, tokens are coloured by the rank that the logit lens gives the next one, and
    otherwise by the norm of their rows. is_served: the page holds no rows of tokens, and asks its server for those of the chosen question. Raises StoreError for a run without questions, for runs that share none, and for a path that is not there.
    """
    questions = run.questions()
    if not len(questions):
        raise StoreError(f"{run.path} has no questions, so there is nothing to show.")
    found = results if isinstance(results, Found) else results_of(run, results)
    other = None if second is None else second_of(run, second)
    shown_rows = question_rows(questions, other)
    rows = shown_rows["rows"]
    columns = {name: any(row[name] is not None for row in rows) for name in NUMBERS}
    tokens = _tokens(run, questions, loaded, is_served=is_served)
    lens = choices_by_layer(found.lens.file, keys_of(questions)) if found.lens and not is_served else {}
    view = {
        "title": shown(run.path.name),
        "about": shown(f"{run.model}, {run.created[:16].replace('T', ' ')}"),
        "n_questions": f"{len(questions):,}",
        "second": other and {"name": shown(second.path.name if second else ""), "told": _alone(other)},
        "facts": [(name, shown(text)) for name, text in facts_of(run).items()],
        "checked": "Every number of the run that this page shows was read against its checksum. `main.py verify RUN --recompute 20` computes rows anew.",
        "version": version("AutomaticEval"),
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        "has": columns,
        "is_many": sum(columns.values()) + (other is not None) > MOST_BESIDE,
        "holds": SERVED if is_served else ALONE,
        "questions_told": _told(len(questions), None if is_served else len(tokens["tokens"]), shown_rows),
        **_scores(questions, other),
        **_probe(run, found),
        **_lens(run, found),
    }
    flags = {"hasSecond": other is not None, "columns": columns}
    data = {"rows": rows, "beginnings": shown_rows["beginnings"], **flags, "lens": lens, **tokens}
    return document(view, data, is_served=is_served)


def _typed(path: Path) -> str:
    """A run's path as a command on the page has it: its name alone, where the rest would tell of this machine."""
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def _tokens(run: Run, questions: Questions, loaded: LoadedModel | None, *, is_served: bool) -> dict[str, Any]:
    """Numbers for the tokens of some questions, and what they are."""
    keys = shown_keys(run.keys, of_lens=loaded is not None)
    numbers = [] if is_served else sampled(questions, keys)
    held = prompt_rows(questions, numbers, keys, None if loaded is None else ranks_by(loaded))
    told = f"Tokens are shown for {len(held)} of {len(questions)} questions, evenly spread over the run; this is none of them."
    return {
        "keys": keys,
        "tokens": {number: each for number, each in held.items() if each["tokens"]},
        "tokensTold": READING if is_served else told,
        "measure": "norm" if loaded is None else "rank of the next token",
        "isRank": loaded is not None,
        "isServed": is_served,
    }


def _told(n: int, n_tokens: int | None, rows: Mapping[str, Any]) -> str:
    """n_tokens: of how many questions the page holds tokens; None for a served one."""
    cut = f" The texts of {rows['n_cut']} questions are cut to {rows['kept_characters']:,} characters." * bool(
        rows["n_cut"]
    )
    if n_tokens is None:
        whole = " until they are chosen." if cut else ""
        return f"All {n:,} questions of the run. The tokens of a prompt are read when it is chosen.{cut[:-1] + whole}"
    return f"All {n:,} questions of the run. Tokens of the prompt are shown for {n_tokens} of them, evenly spread.{cut}"


def _alone(second: Second) -> str:
    return f"{second.n_only_first} questions are only in this run, {second.n_only_second} only in the other."


def _scores(questions: Questions, second: Second | None) -> dict[str, Any]:
    """A chart and a table: one line a task, or what changed."""
    if second is None:
        title, axis, line = "Share answered rightly", "share", None
        points, columns, rows = _of_one_run(scores_of(questions))
    else:
        title, axis, line = "Change of the share answered rightly: other run - this run", "change", 0.0
        points, columns, rows = _of_two_runs(questions, second)
    told, is_change = "Bars: 95 % intervals.", second is not None
    charts = [intervals_chart(title, told, points, axis, line=line, is_change=is_change)] if points else []
    return {"score_charts": charts, "score_columns": columns, "score_rows": rows}


Drawn = tuple[list[dict[str, Any]], list[str], list[tuple[str, ...]]]
"""The points of a chart, and the columns and rows of a table."""


def _of_one_run(scores: Sequence[TaskScore]) -> Drawn:
    rows: list[tuple[str, ...]] = [
        (shown(each.task), _words(each.correct), str(each.n), str(each.n_without)) for each in scores
    ]
    points = _points((each.task, each.correct) for each in scores)
    return points, ["Task", "Right", "Questions", "Without verdict"], rows


def _of_two_runs(questions: Questions, second: Second) -> Drawn:
    rows: list[tuple[str, ...]] = [
        (
            shown(each.task),
            _words(each.difference),
            f"{each.before:.3f}",
            f"{each.after:.3f}",
            _count(each.n_gained),
            _count(each.n_lost),
            str(each.n),
        )
        for each in second.changes
    ]
    points = _points((each.task, each.difference) for each in second.changes)
    columns = ["Task", "Change", "This run", "Other run", "Now right", "Now wrong", "Questions"]
    return points, columns, rows + _only_here(questions, second)


def _points(estimates: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    """A point for each task that has a number. estimates: (task, estimate)."""
    return [
        {"name": task, "mean": each.mean, **_ends(each.interval), "said": f"{task}: {_words(each)}"}
        for task, each in estimates
        if each.mean is not None
    ]


def _only_here(questions: Questions, second: Second) -> list[tuple[str, ...]]:
    """The tasks of which the runs share no question with a verdict: this run's score of each, and no number of the other run."""
    shared = {each.task for each in second.changes}
    alone = [each for each in scores_of(questions) if each.task not in shared and each.task != EVERY]
    return [(shown(each.task), "", _words(each.correct), "", "", "", str(each.n)) for each in alone]


def _ends(interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {"low": low, "high": high}


def _words(estimate: Any) -> str:
    return said({"mean": estimate.mean, "interval": estimate.interval})


def _count(n: int | None) -> str:
    return "" if n is None else str(n)


def _probe(run: Run, found: Found) -> dict[str, Any]:
    """A section for each result. What is no whole result is left out."""
    sections = []
    for each in found.probes:
        try:
            sections.append({**probe_section(each.result), "file": shown(each.name)})
        except (KeyError, TypeError, ValueError) as broken:
            found.leave("probe", f"{each.name} is no whole result ({broken!r}).")
    return {
        "probes": sections,
        "probe_command": shown(f"python main.py probe {_typed(run.path)} --target correct"),
        "probe_left_out": found.left_out.get("probe", []),
    }


def _lens(run: Run, found: Found) -> dict[str, Any]:
    drawn = found.lens
    lines = lens_lines(drawn.result) if drawn else []
    told = "Bands: 95 % intervals. The embeddings stand at -1." if lines else ""
    return {
        "lens_chart": lines_chart("What each layer says", told, lines, ("layer", "share or probability"))
        if lines
        else None,
        "lens_columns": list(LENS_COLUMNS),
        "lens_rows": lens_places(drawn.result) if drawn else [],
        "lens_file": shown(drawn.name) if drawn else "",
        "lens_command": shown(f"python main.py lens {_typed(run.path)}"),
        "lens_left_out": found.left_out.get("lens", []),
    }

"""What is known of a question without its activations: how well these tell the classes apart is what a probe has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.linear import STRENGTHS
from AutomaticEval.store.questions.questions import Questions

Array = np.ndarray[Any, Any]
OF_WORDS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Strengths for TF-IDF, whose rows have the length 1 and are not standardised."""


@dataclass(frozen=True)
class Baseline:
    """Features of questions that a probe learns from in place of activations."""

    name: str
    told: str
    """What they are, in words."""

    rows: Callable[[Fold], Any] | None
    """[n_questions, width] for a fold. None when the run does not hold them."""

    reason: str | None = None
    """Why there are none."""

    strengths: Sequence[float] = STRENGTHS
    n_known: int | None = None
    """Of a column of numbers: the questions that have one."""


def baselines(questions: Questions, target: str) -> list[Baseline]:
    """All baselines that need no row of activations. target: whose own column is none."""
    columns = {name: questions.column(name) for name in ("question", "response", "confidence", "margin", "task")}
    texts = {name: [text or "" for text in columns[name]] for name in ("question", "response")}
    return [
        Baseline("majority", "the more frequent class", _same(np.zeros((len(questions), 1), np.float32))),
        _numbers(
            "confidence", "the model's confidence", columns["confidence"], "no question has several scored choices"
        ),
        _numbers("margin", "the model's margin (nats)", columns["margin"], "no question has several scored choices"),
        _numbers(
            "logprob", "log-probability of the answer, a character", _per_character(questions), "no answer has one"
        ),
        _mean_logprob(questions),
        Baseline("question_length", "length of the question", _same(_lengths(texts["question"]))),
        _if_any("answer_length", "length of the answer", texts["response"], lambda each: _same(_lengths(each))),
        _classes(
            "task", "the task alone", columns["task"], "it is the target" if target == "task" else "there is one task"
        ),
        Baseline("question_words", "words of the question (TF-IDF)", _words(texts["question"]), None, OF_WORDS),
        _if_any("answer_words", "words of the answer (TF-IDF)", texts["response"], _words, OF_WORDS),
    ]


def place_of_right_choice(questions: Questions, target: str) -> Baseline:
    """Where the right choice stands among the choices, for the audit: a label that follows it can be told without knowing anything."""
    told = "the place of the right choice"
    if target in ("answer", "target"):
        return Baseline("right_choice", told, None, "it is the target")
    places = [
        each if isinstance(each, int) and choices else None
        for each, choices in zip(questions.column("target"), questions.column("choices"), strict=True)
    ]
    return _classes("right_choice", told, places, "no question has several choices")


def _same(rows: Any) -> Callable[[Fold], Any]:
    return lambda _: rows


def _lengths(texts: Sequence[str]) -> Array:
    return np.array([[len(text)] for text in texts], np.float32)


def _if_any(
    name: str,
    told: str,
    texts: Sequence[str],
    rows: Callable[[Sequence[str]], Callable[[Fold], Any]],
    strengths: Sequence[float] = STRENGTHS,
) -> Baseline:
    if not any(texts):
        return Baseline(name, told, None, "no question has an answer")
    return Baseline(name, told, rows(texts), None, strengths)


def _numbers(name: str, told: str, values: Sequence[float | None], why_none: str) -> Baseline:
    """One column; with missing values a second one that says where they are missing."""
    known = np.array([value is not None and np.isfinite(value) for value in values])
    if not known.any():
        return Baseline(name, told, None, why_none)
    filled = np.where(known, np.array([value if value is not None else 0.0 for value in values], np.float64), 0.0)
    filled[~known] = filled[known].mean()
    rows = _same(np.stack([filled, known][: 2 - int(known.all())], 1).astype(np.float32))
    n_known = int(known.sum())
    some = "" if known.all() else f", known for {n_known} of {len(known)}"
    return Baseline(name, told + some, rows, n_known=n_known)


def _classes(name: str, told: str, values: Sequence[Any], why_none: str) -> Baseline:
    """A column of 0 and 1 for each value."""
    words = np.array([str(value) for value in values])
    kinds = np.unique(words)
    if len(kinds) < 2 or why_none == "it is the target":
        return Baseline(name, told, None, why_none)
    return Baseline(name, told, _same((words[:, None] == kinds).astype(np.float32)))


def _per_character(questions: Questions) -> list[float | None]:
    """The log-probability of the choice that was taken, or of the single continuation, divided by its length in characters."""
    found: list[float | None] = []
    for logprobs, choices, prediction in zip(
        *map(questions.column, ("logprobs", "choices", "prediction")), strict=True
    ):
        taken = 0 if len(logprobs) == 1 else prediction
        is_known = isinstance(taken, int) and 0 <= taken < len(logprobs)
        found.append(logprobs[taken] / max(1, len(choices[taken])) if is_known else None)
    return found


def _mean_logprob(questions: Questions) -> Baseline:
    has_generated = not all(questions.column("logprobs"))
    why = "older runs did not keep it" if has_generated else "no answer was generated"
    return _numbers(
        "mean_logprob", "mean log-probability of the answer's tokens", questions.column("mean_logprob"), why
    )


def _words(texts: Sequence[str]) -> Callable[[Fold], Any]:
    """TF-IDF of words; which words there are, and how rare each is, is learned from a fold's training part."""

    def rows(fold: Fold) -> Any:
        learned = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+", max_features=20_000, dtype=np.float32)
        learned.fit([texts[number] for number in fold.train])
        return learned.transform(texts)

    return rows

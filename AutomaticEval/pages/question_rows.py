"""The questions of a run as a page holds them: short enough for one file, with what was cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from AutomaticEval.pages.scores import Second, keys_of
from AutomaticEval.safe_text import shown
from AutomaticEval.store.questions.question import Question
from AutomaticEval.store.questions.questions import Questions

MOST_CHARACTERS = 8_000_000
"""Of all prompts and responses of a page together; a longer text is cut in its middle."""
LONGEST, SHORTEST = 30_000, 600
"""The bounds of what is kept of one text."""
LEAST_SHARED = 80
"""Prompts of a task that begin alike for so many characters have that beginning once in the page."""
MOST_CHOICES = 26


def question_rows(questions: Questions, second: Second | None) -> dict[str, Any]:
    """rows: a mapping for each question, in their order; beginnings: task -> the text with which all its prompts begin; n_cut, kept_characters."""
    prompts = prompts_of(questions)
    beginnings = _beginnings(questions.column("task"), prompts)
    kept = min(LONGEST, max(SHORTEST, MOST_CHARACTERS // (2 * max(1, len(questions)))))
    keys = keys_of(questions)
    rows, n_cut = [], 0
    for question, prompt, key in zip(questions, prompts, keys, strict=True):
        beginning = beginnings.get(str(question.task or ""), "")
        row = row_of(question, prompt[len(beginning) :], kept)
        if second is not None and key in second.answers:
            row["other"], row["otherPrediction"] = second.answers[key][0], _said(second.answers[key][1])
        n_cut += row["isCut"]
        rows.append(row)
    shown_beginnings = {task: cut(text, LONGEST)[0] for task, text in beginnings.items()}
    return {"rows": rows, "beginnings": shown_beginnings, "n_cut": n_cut, "kept_characters": kept}


def prompts_of(questions: Questions) -> list[str]:
    """The prompt of each question as the model saw it: of its first choice, or of its answer."""
    columns = questions.source.contents.columns
    if "prompt" not in columns.names:
        return [str(text) for text in questions.column("question")]
    whole = columns.whole("prompt")
    return [whole[number] or "" for number in questions.first_samples.tolist()]


def _beginnings(tasks: Sequence[Any], prompts: Sequence[str]) -> dict[str, str]:
    """Task -> what all its prompts begin with, up to the end of a line, where that is long: few-shot examples."""
    by_task = groupby(sorted(zip((str(task or "") for task in tasks), prompts, strict=True)), lambda each: each[0])
    found = {}
    for task, pairs in by_task:
        texts = [prompt for _, prompt in pairs]
        shared = _shared(texts[0], texts[-1]) if len(texts) > 1 else ""  # they are sorted
        shared = shared[: shared.rfind("\n") + 1]
        if len(shared) >= LEAST_SHARED:
            found[task] = shared
    return found


def _shared(first: str, last: str) -> str:
    """What two texts begin with."""
    n = min(len(first), len(last))
    return first[: next((at for at in range(n) if first[at] != last[at]), n)]


def row_of(question: Question, prompt: str, kept: int) -> dict[str, Any]:
    """A question as a page holds it. kept: so many characters of its prompt, half as many of each other text."""
    texts = {"prompt": prompt, "response": None, "thinking": None, "answer": None}
    if not question.logprobs:
        texts |= {"response": question.response, "thinking": question.thinking, "answer": question.answer}
        if question.thinking is None:
            texts["answer"] = None
        else:
            texts["response"] = None
    n_kept = {name: kept if name == "prompt" else kept // 2 for name in texts}
    cuts = {name: (None, False) if text is None else cut(text, n_kept[name]) for name, text in texts.items()}
    choices = [cut(text, max(80, kept // 8))[0] for text in question.choices[:MOST_CHOICES]]
    return {
        "task": shown(str(question.task or "")),
        "doc": question.doc_id,
        "repeat": question.repeat or 0,
        "correct": question.correct,
        "confidence": rounded(question.confidence),
        "margin": rounded(question.margin),
        "tokenProbability": None if question.mean_logprob is None else rounded(math.exp(question.mean_logprob)),
        **{name: text for name, (text, _) in cuts.items()},
        "isCut": any(is_cut for _, is_cut in cuts.values()) or len(question.choices) > MOST_CHOICES,
        "choices": choices if question.logprobs else [],
        "probabilities": [rounded(each) for each in question.probabilities[:MOST_CHOICES]],
        "logprobs": [rounded(each) for each in question.logprobs[:MOST_CHOICES]],
        "target": _said(question.target),
        "prediction": _said(question.prediction),
    }


def cut(text: str, most: int) -> tuple[str, bool]:
    """The text, and whether its middle was left out; the mark says how much. Control characters are spelled out."""
    if len(text) <= most:
        return shown(text), False
    head = most // 3
    n_out = len(text) - most
    return shown(f"{text[:head]}\n[… {n_out:,} characters left out …]\n{text[len(text) - (most - head) :]}"), True


def rounded(value: Any) -> float | None:
    """A number with four digits; None for one that is infinite or NaN."""
    if not isinstance(value, int | float) or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.4g}")


def _said(value: Any) -> int | str | None:
    """A target or prediction: the number of a choice, or words."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return None if value is None else cut(str(value), 400)[0]


def of_tasks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks of rows by name."""
    return sorted({str(row["task"]) for row in rows})

"""`Question`: what a run says of one question, and how each of its values follows from the question's samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.safe_text import html_lines, html_table, html_text
from AutomaticEval.thinking.text import Said, said_of_record, split_thinking
from AutomaticEval.thinking.where import COLUMNS

Samples = Sequence[Mapping[str, Any]]
"""The samples of one question, in ascending order of choice and window: column -> value."""


@dataclass(frozen=True)
class Question:
    """One question of a run, with what the model made of it. A value that the question does not have is None."""

    task: str | None
    """lm-eval's task."""

    doc_id: int | None
    """The document's index in the task."""

    repeat: int | None
    """Which of several sampled answers this is; otherwise 0."""

    question: str
    """The prompt. Where each choice has a prompt of its own, the words with which all of them begin."""

    choices: list[str]
    """[n_choices]: the text of every choice, as it was scored. Of a single scored continuation its text; empty for a generated answer."""

    target: Any
    """lm-eval's target: for choices the number of the right one."""

    prediction: Any
    """The number of the likeliest choice, or the filtered answer. None where `correct` follows another rule (acc_norm)."""

    correct: bool | None
    logprobs: list[float]
    """[n_choices]: the log-probability of every choice (nats)."""

    probabilities: list[float]
    """[n_choices]: the softmax over logprobs. Of a single continuation, its own probability."""

    margin: float | None
    """The log-probability of the likeliest choice minus that of the next (nats)."""

    confidence: float | None
    """The largest of probabilities, of two choices or more."""

    mean_logprob: float | None
    """The mean of token_logprobs (nats a token)."""

    token_logprobs: Sequence[float] | None
    """[n_tokens]: the log-probability of each token of a generated answer (nats), under the model's own distribution. None for choices, and
    in runs of versions that did not keep it."""

    response: str | None
    """The generated text, or the text of the choice that was predicted."""

    thinking: str | None
    """What the model thought, without the marks around it such as `<think>`; None for a response without thinking."""

    answer: str | None
    """The response without its thinking. None when the thinking was not finished."""

    tokens: Mapping[int, str] = field(default_factory=dict, repr=False, compare=False)
    """Position in the prompt -> the token, for those tokens of the first choice's prompt that have rows."""

    @property
    def name(self) -> str:
        """`mmlu_anatomy document 3`; of a question that was asked alone, how it begins."""
        return f"{self.task} document {self.doc_id}" if self.task else f"the question {self.question[:40]!r}"

    @property
    def verdict(self) -> str:
        """right, wrong, or no verdict."""
        return {True: "right", False: "wrong", None: "no verdict"}[self.correct]

    def _repr_html_(self) -> str:
        """For notebooks: the question, its choices with their probabilities, what the model took, the verdict, and the tokens that have rows."""
        choices = [
            (f"{probability:.3f}", choice, _taken_or_target(self, number))
            for number, (choice, probability) in enumerate(zip(self.choices, self.probabilities, strict=False))
        ]
        answer = [("Response", str(self.response)), ("Target", str(self.target))]
        if self.mean_logprob is not None:
            answer.append(("Mean log-probability of a token", f"{self.mean_logprob:.4f} nats"))
        tokens = " ".join(f"{position}:{token!r}" for position, token in self.tokens.items())
        return (
            f"<p><b>{html_text(self.name)}: {self.verdict}</b></p><pre style='white-space:pre-wrap'>{html_text(self.question)}</pre>"
            f"{html_lines(('Probability', 'Choice', ''), choices) if choices else html_table('', answer)}"
            f"<details><summary>{len(self.tokens)} tokens of the prompt have rows</summary><code>{html_text(tokens)}</code></details>"
        )


def _taken_or_target(question: Question, choice: int) -> str:
    told = (("taken", question.prediction), ("target", question.target))
    return ", ".join(name for name, which in told if which == choice)


class Field(NamedTuple):
    """How a value of a question follows from its samples."""

    columns: tuple[str, ...]
    """The columns that it needs."""

    of: Callable[[Samples], Any]


def n_choices(samples: Samples) -> int:
    """How many choices were scored; 0 for a generated answer."""
    return len(_by_choice(samples)) if samples[0].get("logprob") is not None else 0


def _by_choice(samples: Samples) -> dict[Any, list[Mapping[str, Any]]]:
    """choice -> its samples: one, or one a window of a text."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample.get("choice"), []).append(sample)
    return found


def _first(name: str) -> Field:
    return Field((name,), lambda samples: samples[0].get(name))


def _question(samples: Samples) -> str:
    asked: str = samples[0].get("question") or _beginning(
        [sample["prompt"] for sample in samples if not sample.get("window")]
    )
    return asked


def _beginning(prompts: Sequence[str]) -> str:
    """The words with which all prompts begin."""
    first, last = min(prompts), max(prompts)
    if first == last:
        return first
    n = next((at for at, letter in enumerate(first) if last[at] != letter), len(first))
    while n and not first[n - 1].isspace():
        n -= 1
    return first[:n]


def _choices(samples: Samples) -> list[str]:
    if not n_choices(samples):
        return list(samples[0].get("choices") or [])  # those of a question that was asked alone
    choices = _by_choice(samples).values()
    n_shared = len(_beginning([windows[0]["prompt"] for windows in choices]))
    return [windows[0]["prompt"][n_shared:] + "".join(each["response"] for each in windows) for windows in choices]


def _logprobs(samples: Samples) -> list[float]:
    if not n_choices(samples):
        return []
    return [sum(each["logprob"] for each in windows) for windows in _by_choice(samples).values()]


def _probabilities(samples: Samples) -> list[float]:
    logprobs = np.array(_logprobs(samples))
    if len(logprobs) > 1:
        logprobs = logprobs - np.logaddexp.reduce(logprobs)
    probabilities: list[float] = np.exp(logprobs).tolist()
    return probabilities


def _margin(samples: Samples) -> float | None:
    logprobs = _logprobs(samples)
    if len(logprobs) < 2 or any(map(math.isnan, logprobs)):
        return None
    second, first = sorted(logprobs)[-2:]
    return first - second


def _confidence(samples: Samples) -> float | None:
    probabilities = _probabilities(samples)
    return max(probabilities) if len(probabilities) > 1 and not any(map(math.isnan, probabilities)) else None


def _mean_logprob(samples: Samples) -> float | None:
    numbers = samples[0].get("token_logprobs")
    return float(np.mean(numbers, dtype=np.float64)) if numbers else None


def _prediction(samples: Samples) -> Any:
    first = samples[0]
    return first["prediction"] if "prediction" in first else first.get("extracted_answer")


def _response(samples: Samples) -> str | None:
    if not n_choices(samples):
        generated: str = samples[0]["response"]
        return generated
    taken = _prediction(samples)
    return _choices(samples)[taken] if isinstance(taken, int) else None


def _said(samples: Samples) -> Said:
    response = _response(samples)
    if response is None:
        return Said(None, None)
    if n_choices(samples):
        return split_thinking(response)
    return said_of_record(samples[0], response, samples[0]["prompt"])


def _stripped(text: str | None) -> str | None:
    return None if text is None else text.strip()


_SCORED = ("choice", "logprob")
_TEXTS = (*_SCORED, "window", "choices", "prompt", "response")
_ANSWERED = (*_TEXTS, "prediction", "extracted_answer")
_IN_PARTS = (*_ANSWERED, *COLUMNS, "thinking", "answer")
FIELDS = {
    "task": _first("task"),
    "doc_id": _first("doc_id"),
    "repeat": _first("repeat"),
    "question": Field(("question", "prompt", "window"), _question),
    "choices": Field(_TEXTS, _choices),
    "target": _first("target"),
    "prediction": Field(("prediction", "extracted_answer"), _prediction),
    "correct": _first("correct"),
    "logprobs": Field(_SCORED, _logprobs),
    "probabilities": Field(_SCORED, _probabilities),
    "margin": Field(_SCORED, _margin),
    "confidence": Field(_SCORED, _confidence),
    "mean_logprob": Field(("token_logprobs",), _mean_logprob),
    "token_logprobs": _first("token_logprobs"),
    "response": Field(_ANSWERED, _response),
    "thinking": Field(_IN_PARTS, lambda samples: _stripped(_said(samples).thinking)),
    "answer": Field(_IN_PARTS, lambda samples: _stripped(_said(samples).answer)),
}
"""Value of a Question -> how it is made."""
assert [*FIELDS, "tokens"] == [each.name for each in fields(Question)]

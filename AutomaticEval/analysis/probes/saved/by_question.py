"""What the best probe says of each question that it has not learned from, as columns."""

from __future__ import annotations

from typing import Any

from AutomaticEval.analysis.probes.out_of_fold import OutOfFold
from AutomaticEval.analysis.probes.target import Target

NAMES = ("task", "doc_id", "repeat")


def by_question(of: Target, found: OutOfFold) -> dict[str, list[Any]]:
    """task, doc_id and repeat of each question, its label, the probability that it has the label 1, and the model's own confidence.

    found: of the best place. The probability is the mean over repeats; of several classes each question has a list of them. Each list is [n_questions].
    """
    return {
        **{name: of.questions.column(name) for name in NAMES},
        "label": of.labels.tolist(),
        "probability": found.probabilities.mean(-2).T.tolist(),
        "confidence": of.questions.column("confidence"),
    }

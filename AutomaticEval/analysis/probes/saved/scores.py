"""What a saved probe says of the questions of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.asked import rows_of
from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.intervals import auroc_within_folds, estimate
from AutomaticEval.analysis.probes.saved.by_question import NAMES
from AutomaticEval.analysis.probes.saved.learned_on_all import in_chat_template, known_again
from AutomaticEval.analysis.probes.saved.saved_probe import SavedProbe
from AutomaticEval.analysis.probes.target import COLUMNS, word_of
from AutomaticEval.analysis.result import Estimate
from AutomaticEval.errors import SelectionError, StoreError, warn
from AutomaticEval.settings import MODEL
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scores:
    """What a saved probe says of each question of a run."""

    columns: dict[str, list[Any]]
    """task, doc_id, repeat, probability, label (1, 0, or None where it is not known) and is_learned (the probe learned from the question)."""

    auroc: Estimate
    """Over the questions with a label that the probe has not learned from."""

    n_learned: int
    """Questions that the probe learned from, which the AUROC leaves out."""


def scores_of(probe: SavedProbe, run: Run) -> Scores:
    """The probability that each question of a run is of the probe's class.

    Raises SelectionError for a run with rows of another width, or reduced ones; StoreError for one without the site or the position. Warns of another model.
    """
    refuse_reduced(run.settings, "a saved probe")
    questions = run.questions()
    _check(probe, run, questions)
    said = probe.probabilities(rows_of(questions, probe.site, probe.position))
    labels, known = _labels(probe, questions), set(probe.learned_from.tolist())
    is_learned = [not known.isdisjoint(each) for each in known_again(questions)]
    columns = {
        **{name: questions.column(name) for name in NAMES},
        "probability": said.tolist(),
        "label": labels,
        "is_learned": is_learned,
    }
    judged = [number for number, label in enumerate(labels) if label is not None and not is_learned[number]]
    return Scores(columns, _auroc(said, labels, judged, questions.groups), sum(is_learned))


def check_model(probe: SavedProbe, name: str, model_hash: str | None) -> None:
    """Warns where the rows are of other numbers than those that the probe learned from."""
    if None not in (probe.model_hash, model_hash) and probe.model_hash != model_hash:
        warn(
            f"the probe learned from {probe.model}, and {name} has other numbers: its probability means something only if one was made from the other "
            "(fine-tuned, edited, quantised)."
        )


def _check(probe: SavedProbe, run: Run, questions: Questions) -> None:
    if not len(questions):
        raise StoreError(f"{run.path} has no questions, so that there is nothing to score.")
    width = questions.source.rows(questions.source.key(probe.site), np.zeros(0, np.int64)).shape[-1]
    if width != probe.width:
        raise SelectionError(
            f"{probe.site} has {width} numbers in {run.path}, and the probe learned from rows of {probe.width} ({probe.model}): give a run of that model."
        )
    check_model(probe, questions.source.contents.model, run.settings.get(MODEL))
    if in_chat_template(run) != probe.chat_template:
        warn(
            f"the prompts of {run.path} and those that the probe learned from differ in the chat template: one has it."
        )


def _labels(probe: SavedProbe, questions: Questions) -> list[int | None]:
    """None for a question without a value, and for a value that is neither of the classes. A run without the column has no labels."""
    try:
        values = questions.column(COLUMNS.get(probe.target, probe.target))
    except StoreError:
        return [None] * len(questions)
    has_rest = probe.negative.startswith("the other ")
    words = [None if value is None else word_of(value) for value in values]
    return [
        None
        if word is None or not (has_rest or word in (probe.positive, probe.negative))
        else int(word == probe.positive)
        for word in words
    ]


def _auroc(said: Array, labels: list[int | None], judged: list[int], groups: Array) -> Estimate:
    """As of one fold, over groups of equal prompts."""
    true = np.array([labels[number] or 0 for number in judged], int)
    if len(set(true.tolist())) < 2:
        return Estimate(None, None, len(judged), reason="no questions of both classes are left that have a label.")
    nobody = np.array([], int)
    share = auroc_within_folds(said[judged][None], true, [[Fold(nobody, nobody, np.arange(len(judged)))]])
    return estimate(share, groups[judged], true)


def is_path(text: str) -> bool:
    """Whether a text is a file or folder, or is one word that can hardly be anything else: with a slash or an underscore, or the ending of a file."""
    path = Path(text).expanduser()
    try:
        if path.exists():
            return True
    except (OSError, ValueError):  # too long for a name
        return False
    is_word = text.isascii() and not any(letter.isspace() for letter in text)
    return is_word and (any(sign in text for sign in "/\\_") or path.suffix in (".h5", ".hdf5"))

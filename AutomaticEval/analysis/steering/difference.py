"""Directions from runs: the difference of the mean rows of two kinds of question, or of two runs over the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.analysis.compare_runs import same_prompts, shared_questions
from AutomaticEval.analysis.steering.direction import Direction
from AutomaticEval.errors import StoreError
from AutomaticEval.settings import MODEL
from AutomaticEval.sites import refuse_ids, site_of
from AutomaticEval.store.questions.questions import AT, Questions
from AutomaticEval.store.reader import as_run
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run


def difference_of_means(
    questions: Run | Questions | str | Path,
    key: str,
    label: str | Iterable[bool | None] = "correct",
    position: str | int = AT,
) -> Direction:
    """The mean row of the questions whose label is true, minus that of those whose label is false.

    questions: a run, its path, or some of its questions. key: the site, in any spelling (resid_post.14, layer_14). label: a column, such as correct, or a truth
    value for each question; questions with None are left out. position: as in `Questions.activations`, by default the last token before any choice or
    answer. Means are computed in float64. Raises SelectionError for rows that were reduced; StoreError for labels that are no truth values, and when one side has no question.
    """
    asked = questions if isinstance(questions, Questions) else as_run(questions).questions()
    refuse_reduced(asked.source.contents.settings, "a direction")
    refuse_ids([asked.source.key(key)], "a direction")
    name, given = (label, asked.column(label)) if isinstance(label, str) else ("given labels", list(label))
    labels = _truths(asked, name, given)
    known = asked.take([number for number, each in enumerate(labels) if each is not None])
    sides = torch.tensor([each for each in labels if each is not None], dtype=torch.bool)
    n_true, n_false = int(sides.sum()), int((~sides).sum())
    if not n_true or not n_false:
        raise StoreError(
            f"{asked.source.path}: the label {name} is true for {n_true} questions and false for {n_false}; a difference of means needs both."
        )
    rows = known.activations(key, position).double()
    return Direction(
        _not_all_0(rows[sides].mean(0) - rows[~sides].mean(0), key, position),
        *site_of(asked.source.key(key)),
        f"difference of means of {name} over {asked.source.path.name}",
        {**_told([asked], rows, position), "label": name, "n_true": n_true, "n_false": n_false},
    )


def difference_of_runs(before: Run, after: Run, keys: Sequence[str], position: str | int = AT) -> list[Direction]:
    """For each site the mean row in the second run minus that in the first, over the questions that both asked in the same words.

    keys, position: as in `difference_of_means`. Raises SelectionError for rows that were reduced; StoreError for runs without such questions, and for a
    site whose widths differ.
    """
    both = shared_questions(before, after)[:2]
    same = same_prompts(zip(*both, strict=True))
    one, other = (questions.where(same) for questions in both)
    for each in (one, other):
        refuse_reduced(each.source.contents.settings, "a direction")
    refuse_ids([one.source.key(key) for key in keys], "a direction")
    if not len(one):
        raise StoreError(
            f"{before.path} and {after.path} asked no question in the same words, so that no rows can be compared."
        )
    return [_between(one, other, key, position) for key in keys]


def _between(one: Questions, other: Questions, key: str, position: str | int) -> Direction:
    rows = [each.activations(key, position).double() for each in (one, other)]
    if rows[0].shape != rows[1].shape:
        raise StoreError(
            f"{key} has {rows[0].shape[1]} numbers in {one.source.path} and {rows[1].shape[1]} in {other.source.path}."
        )
    return Direction(
        _not_all_0(rows[1].mean(0) - rows[0].mean(0), key, position),
        *site_of(one.source.key(key)),
        f"mean of {other.source.path.name} minus mean of {one.source.path.name}",
        {**_told([one, other], torch.cat(rows), position), "label": "run", "n_true": len(other), "n_false": len(one)},
    )


def _not_all_0(difference: Tensor, key: str, position: str | int) -> Tensor:
    """The difference. Raises StoreError when both sides have the same mean row."""
    if not difference.any():
        raise StoreError(
            f"the rows of {key} at {position} have the same mean on both sides, so that there is no direction: at the embeddings, so it is where "
            "every question ends in the same token. Choose another site, layer or position."
        )
    return difference


def _truths(questions: Questions, name: str, given: Sequence[Any]) -> list[bool | None]:
    """A truth value, or None, for each question. Raises StoreError."""
    if len(given) != len(questions):
        raise StoreError(f"{len(given)} labels were given for {len(questions)} questions; give one for each.")
    for each in given:
        if not (each is None or isinstance(each, bool | np.bool_)):
            raise StoreError(
                f"the label {name} is {each!r} for a question; it must be true, false, or None for one that is left out."
            )
    return [None if each is None else bool(each) for each in given]


def _told(asked: Sequence[Questions], rows: Tensor, position: str | int) -> dict[str, Any]:
    """What a direction's file says of the runs that it was made from."""
    runs = [(each.source.path, each.source.contents) for each in asked]
    models = [{"name": held.model, "hash": held.settings.get(MODEL)} for _, held in runs]
    edits = [edit for _, held in runs for edit in held.settings.get("edits") or ()]
    told = {
        "models": [each for number, each in enumerate(models) if each not in models[:number]],
        "runs": [{"name": path.name, "run_id": held.settings.get("run_id")} for path, held in runs],
        "position": str(position),
        "mean_norm": float(rows.norm(dim=1).mean()),
    }
    return told | ({"edits": edits} if edits else {})

"""How a probe is asked for, and what of a run it needs for that: its folds, its places, and its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.folds import LEAST_FOLDS, folds
from AutomaticEval.analysis.probes.judged import Judge
from AutomaticEval.analysis.probes.target import Target, refuse_rare
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.sites import holds_ids, kind_and_layer, refuse_ids, site_of
from AutomaticEval.store.questions.questions import Questions

Array = np.ndarray[Any, Any]
SPLITS = ("question", "task")
NOT_PROBED = ("pattern", "logits")
"""Kinds that are probed only when they are named: rows as long as their sequence, or as the vocabulary."""
OF_EMBEDDING = "embed"


@dataclass(frozen=True)
class Asked:
    """How a probe is asked for. Raises SelectionError for a value that means nothing."""

    target: str
    position: str
    split: str
    n_folds: int
    n_repeats: int
    seed: int

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise SelectionError(f"no split {self.split!r}; there are {', '.join(SPLITS)}.")
        if self.n_folds < LEAST_FOLDS:
            raise SelectionError(
                f"{self.n_folds} folds were asked for; give at least {LEAST_FOLDS}: to learn from, to choose on and to judge on."
            )
        if self.n_repeats < 1:
            raise SelectionError(f"{self.n_repeats} repeats were asked for; give 1 or more.")


def judge_of(of: Target, asked: Asked) -> Judge:
    """The folds of a run's questions. Raises StoreError for a run with too few questions or tasks."""
    if asked.split == "question":
        units, unit, n_folds = of.questions.groups, "different questions", asked.n_folds
    else:
        tasks, units = np.unique([str(task) for task in of.questions.column("task")], return_inverse=True)
        unit, n_folds = "tasks", min(asked.n_folds, len(tasks))
        if len(tasks) < LEAST_FOLDS:
            raise StoreError(
                f"{of.questions.source.path} has {len(tasks)} task(s); split='task' needs at least {LEAST_FOLDS}: to learn from, to choose on and to judge on."
            )
    refuse_rare(of, units, unit, n_folds)
    repeats = list(folds(of.labels, units, n_folds, asked.n_repeats, asked.seed, unit))
    return Judge(of.labels, units, repeats)


def sites_of(stored: Sequence[str], questions: Questions, keys: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """The places to probe, and the embedding, which is a baseline, if the run has it."""
    usual = [key for key in stored if kind_and_layer(key).kind not in NOT_PROBED and not holds_ids(key)]
    wanted = usual if keys is None else [questions.source.key(key) for key in keys]
    refuse_ids(wanted, "a probe")
    embedding = [key for key in stored if site_of(key).kind == OF_EMBEDDING]
    if not wanted:
        raise StoreError(
            f"{questions.source.path} holds nothing that is probed without being named; it holds {', '.join(stored)}. Name one of them (keys=, --sites)."
        )
    sites = [key for key in wanted if key not in embedding]
    return list(dict.fromkeys(sites or wanted)), [key for key in embedding if sites]


def rows_of(questions: Questions, key: str, position: str) -> Array:
    """[n_questions, width], float32. Raises StoreError for rows that are not finite."""
    rows: Array = questions.activations(key, position).float().numpy()
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise StoreError(
            f"{questions.source.path}: the rows of {len(wrong)} questions at {key} have numbers that are infinite or NaN, the first of them "
            f"{questions[int(wrong[0])].name}. Leave these out: run.where(run.finite())."
        )
    return rows

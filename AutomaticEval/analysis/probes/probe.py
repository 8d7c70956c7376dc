"""Whether, and where, rows of a run tell one class of questions from another, beside what tells them apart without any row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.numbers.estimate import methods
from AutomaticEval.analysis.probes import duplicates, intervals
from AutomaticEval.analysis.probes.audit import findings
from AutomaticEval.analysis.probes.baselines import Baseline, baselines, place_of_right_choice
from AutomaticEval.analysis.probes.folds import LEAST_FOLDS, folds
from AutomaticEval.analysis.probes.judged import Judge, JudgedBaseline, JudgedPlace
from AutomaticEval.analysis.probes.out_of_fold import best_of, out_of_fold
from AutomaticEval.analysis.probes.places import N_SHUFFLES, Place, p_values, probed, shuffled_labels
from AutomaticEval.analysis.probes.target import Target, target_of
from AutomaticEval.analysis.result import Result
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.sites import kind_and_layer, site_of
from AutomaticEval.store.questions.questions import AT, Questions
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
SPLITS = ("question", "task")
NOT_PROBED = ("pattern", "logits")
"""Kinds that are probed only when they are named: rows as long as their sequence, or as the vocabulary."""
OF_EMBEDDING = "embed"
STRICT = 50
"""Shuffled labels are off chance by an interval at the level of so many numbers: 99.9 %."""
P_METHOD = f"{N_SHUFFLES} shuffles of the labels, for the difference of means, corrected by the highest AUROC over all places (single-step maxT)"


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


def probe(
    run: Run,
    target: str = "correct",
    keys: Iterable[str] | None = None,
    *,
    positive: Any = None,
    position: str = AT,
    split: str = "question",
    n_folds: int = 5,
    n_repeats: int = 1,
    seed: int = 42,
    advance: Callable[[int], None] = lambda _: None,
) -> Result:
    """Linear probes for a class of questions at every place of a run, with baselines and an audit of leaks.

    >>> result = probe(open_run("results/run"), "correct")
    >>> result.measured["best"]["judged"].auroc

    target: `correct`, `answer` (the right one), `task`, or a column of questions; positive: the value that is told from all others, needed where there
    are more than two. keys: sites, in any spelling; by default all of the run but patterns and logits. position: as in `Questions.activations`. split: `question` keeps equal
    prompts in one fold, `task` whole tasks. advance: is told of each place that is done.

    The result's `measured` has `findings` (of the audit), `best` (the place is chosen inside each fold's training part), `places` (`JudgedPlace`) and
    `baselines` (`JudgedBaseline`). Memory holds the rows of four places at once.
    Raises SelectionError for what cannot be asked, StoreError for a run with too few questions, one class, or without the rows.
    """
    asked = Asked(target, position, split, n_folds, n_repeats, seed)
    of = target_of(run.questions(), target, positive)
    judge = _judge(of, asked)
    sites, embedding = _sites(run.keys, of.questions, keys)
    shuffles = shuffled_labels(of.labels, of.questions.groups, seed)
    places = probed(
        [*sites, *embedding],
        lambda key: _rows(of.questions, key, position),
        of.labels,
        judge.repeats,
        shuffles,
        advance,
    )
    return _result(of, asked, judge, places[: len(sites)], places[len(sites) :], shuffles[0])


def _judge(of: Target, asked: Asked) -> Judge:
    if asked.split == "question":
        units, unit, n_folds = of.questions.groups, "different questions", asked.n_folds
    else:
        tasks, units = np.unique([str(task) for task in of.questions.column("task")], return_inverse=True)
        unit, n_folds = "tasks", min(asked.n_folds, len(tasks))
        if len(tasks) < LEAST_FOLDS:
            raise StoreError(
                f"{of.questions.source.path} has {len(tasks)} task(s); split='task' needs at least {LEAST_FOLDS}: to learn from, to choose on and to judge on."
            )
    repeats = list(folds(of.labels, units, n_folds, asked.n_repeats, asked.seed, unit))
    return Judge(of.labels, units, repeats)


def _sites(stored: Sequence[str], questions: Questions, keys: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """The places to probe, and the embedding, which is a baseline, if the run has it."""
    usual = [key for key in stored if kind_and_layer(key).kind not in NOT_PROBED]
    wanted = usual if keys is None else [questions.source.key(key) for key in keys]
    embedding = [key for key in stored if site_of(key).kind == OF_EMBEDDING]
    if not wanted:
        raise StoreError(
            f"{questions.source.path} holds nothing that is probed without being named; it holds {', '.join(stored)}. Name one of them (keys=, --sites)."
        )
    sites = [key for key in wanted if key not in embedding]
    return list(dict.fromkeys(sites or wanted)), [key for key in embedding if sites]


def _rows(questions: Questions, key: str, position: str) -> Array:
    """[n_questions, width], float32. Raises StoreError for rows that are not finite."""
    rows: Array = questions.activations(key, position).float().numpy()
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise StoreError(
            f"{questions.source.path}: the rows of {len(wrong)} questions at {key} have numbers that are infinite or NaN, the first of them "
            f"{questions[int(wrong[0])].name}. Leave these out: run.where(run.finite())."
        )
    return rows


def _result(
    of: Target, asked: Asked, judge: Judge, places: Sequence[Place], embedding: Sequence[Place], shuffled: Array
) -> Result:
    found, chosen = best_of([each.found for each in places], judge.repeats)
    best = judge(found)
    counted = Counter(places[number].key for number in chosen.ravel())
    top = counted.most_common(1)[0][0]
    given = baselines(of.questions, asked.target)
    looked = [place_of_right_choice(of.questions, asked.target), _first_token(of.questions, top, asked.position)]
    n_compared = sum(each.rows is not None for each in (*given, *looked)) + len(embedding)
    of_best = judge.auroc(found.log_odds)

    def judged(each: Baseline) -> JudgedBaseline:
        if each.rows is None:
            return JudgedBaseline(each.name, each.told, None, each.reason)
        said = out_of_fold(each.rows, of.labels, judge.repeats, each.strengths)
        return JudgedBaseline(each.name, each.told, judge(said, n_compared, of_best))

    listed = [judged(each) for each in given]
    listed += [
        JudgedBaseline("embedding", "the embedding layer", judge(each.found, n_compared, of_best)) for each in embedding
    ] or [JudgedBaseline("embedding", "the embedding layer", None, "the run has none, or it is the place itself")]
    listed.append(_with_shuffled_labels(of, asked, judge, top, shuffled))
    checked = [judged(each) for each in looked]
    measured = {
        "findings": findings(best, [*listed, *checked], of, asked.position),
        "run": {"path": of.questions.source.path.name, "model": of.questions.source.contents.model},
        "classes": {
            "target": of.name,
            "positive": of.positive,
            "negative": of.negative,
            "n_positive": int(of.labels.sum()),
            "n_negative": int((1 - of.labels).sum()),
            "n_left_out": of.n_left_out,
            "n_groups": len(np.unique(judge.units)),
        },
        "best": {"judged": best, "places": dict(counted.most_common())},
        "places": _judged_places(judge, places, of_best, asked),
        "baselines": listed,
        "checks": checked,
    }
    return Result("probe", measured, _settings(asked, judge), _methods(asked, len(places)))


def _judged_places(judge: Judge, places: Sequence[Place], best: intervals.Share, asked: Asked) -> list[JudgedPlace]:
    along = [judge.auroc(each.along_means) for each in places]
    ps: Sequence[float | None] = [None] * len(places)
    if asked.split == "question":
        ps = p_values([each.value for each in along], [each.shuffled for each in places])
    n = len(places)
    return [
        JudgedPlace(place.key, judge(place.found, n, best), judge.estimate(share, n), p)
        for place, share, p in zip(places, along, ps, strict=True)
    ]


def _with_shuffled_labels(of: Target, asked: Asked, judge: Judge, key: str, labels: Array) -> JudgedBaseline:
    """The whole of it once more, with labels that were given to other questions: folds, strengths and probes."""
    n_folds = len(judge.repeats[0])
    repeats = list(folds(labels, judge.units, n_folds, asked.n_repeats, asked.seed))
    rows = _rows(of.questions, key, asked.position)
    found = out_of_fold(lambda _: rows, labels, repeats)
    return JudgedBaseline("shuffled", f"shuffled labels, {key}", Judge(labels, judge.units, repeats)(found, STRICT))


def _first_token(questions: Questions, key: str, position: str) -> Baseline:
    """The row of the prompt's first token, which has seen no other."""
    told = f"{key} at the first token of the prompt"
    if position == "prompt[0]":
        return Baseline("first_token", told, None, "it is where the probe is")
    try:
        rows = _rows(questions, key, "prompt[0]")
    except StoreError:
        return Baseline("first_token", told, None, "the run did not keep it")
    if not np.ptp(rows, axis=0).any():
        return Baseline("first_token", told, None, "all prompts begin with the same token")
    return Baseline("first_token", told, lambda _: rows)


def _settings(asked: Asked, judge: Judge) -> dict[str, Any]:
    return {**asdict(asked), "n_folds": len(judge.repeats[0])}


def _methods(asked: Asked, n_places: int) -> dict[str, Any]:
    told = methods(n_places, p=P_METHOD if asked.split == "question" else None)
    return {
        **told,
        "interval": intervals.METHOD,
        "probe": "logistic regression, L2, standardised rows; the strength has the smallest log loss on the fold after the tested one",
        "best": "the place with the highest AUROC where strengths were chosen, fold by fold",
        "near_duplicates": duplicates.METHOD,
    }

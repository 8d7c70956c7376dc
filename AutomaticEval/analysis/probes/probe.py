"""Whether, and where, rows of a run tell one class of questions from another, beside what tells them apart without any row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from AutomaticEval.analysis.numbers.estimate import methods
from AutomaticEval.analysis.probes import intervals
from AutomaticEval.analysis.probes.across.transfer import Learned, learned, others_of, transfers
from AutomaticEval.analysis.probes.asked import Asked, judge_of, rows_of, sites_of
from AutomaticEval.analysis.probes.baselines import Baseline, baselines, place_of_right_choice
from AutomaticEval.analysis.probes.folds import folds
from AutomaticEval.analysis.probes.grid.positions import Grid, grid_of
from AutomaticEval.analysis.probes.grid.spots import Spot, positions_in, spots_of
from AutomaticEval.analysis.probes.judged import Judge, JudgedBaseline, JudgedPlace
from AutomaticEval.analysis.probes.leaks import duplicates
from AutomaticEval.analysis.probes.leaks.audit import findings
from AutomaticEval.analysis.probes.leaks.random_weights import ready_random_model, with_random_weights
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold, best_of, out_of_fold
from AutomaticEval.analysis.probes.parts.kept_places import KeptPlaces
from AutomaticEval.analysis.probes.places import N_SHUFFLES, Place, p_values, probed, shuffled_labels
from AutomaticEval.analysis.probes.saved.by_question import by_question
from AutomaticEval.analysis.probes.saved.learned_on_all import usual_strength
from AutomaticEval.analysis.probes.target import Target, refuse_several, target_of
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.store.questions.questions import AT, Questions
from AutomaticEval.store.reader import as_run
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
STRICT = 50
"""Shuffled labels are off chance by an interval at the level of so many numbers: 99.9 %."""
P_METHOD = f"{N_SHUFFLES} shuffles of the labels, for the difference of means, corrected by the highest AUROC over all places (single-step maxT)"


def probe(
    run: Run | str | Path,
    target: str = "correct",
    keys: Iterable[str] | None = None,
    *,
    positive: Any = None,
    position: str | Sequence[str] | None = None,
    grid: bool = False,
    split: str = "question",
    n_folds: int = 5,
    n_repeats: int = 1,
    seed: int = 42,
    transfer: Sequence[Run | str | Path] = (),
    random_model: bool = False,
    folder: str | Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
    expect: Callable[[int], None] = lambda _: None,
) -> Result:
    """Linear probes for a class of questions at every place of a run, with baselines and an audit of leaks.

    >>> result = probe(open_run("results/run"), "correct")
    >>> result.measured["best"]["judged"].auroc

    run: an open run, or its path. target: `correct`, `answer` (the right one), `task`, or a column of questions; positive: the value that is told from all others; without it,
    a column of 3 to 20 values is told apart class by class. keys: sites, in any spelling; by default all of the run but patterns and logits. position: a text as in
    `Questions.activations`, by default prompt[-1]; several (a sequence, or with commas) make each site at each position a place. grid: the usual positions, of those that every
    question has. split: `question` keeps equal prompts in one fold, `task` whole tasks. transfer: further runs of the same model, on which this run's probes
    are judged, and the other way round. random_model: one more baseline, the same model with random weights. folder: where each place is kept when it is done,
    so that the same call goes on where it was cut short; delete it when the result is written. advance: is told of each place that is done, and of each question
    that the random model read; expect: of how many there will be.

    The result's `measured` has `findings` (of the audit), `best` (the place is chosen inside each fold's training part), `places` (`JudgedPlace`),
    `baselines` (`JudgedBaseline`), `questions` (columns: what the best place says of each), with several positions `grid` (`left_out`) and, with further
    runs, `transfer`, whose `cells` are `Transfer`. Of several classes AUROCs are means over classes, each against the rest, and `best` has `by_class`.
    Memory holds the rows of four places at once.
    Raises SelectionError for what cannot be asked, OtherSettings for a folder with places of another probe, StoreError for a run with too few questions, one
    class, or without the rows.
    """
    run, transfer = _runs_of(run, transfer)
    if grid and position is not None:
        raise SelectionError(
            f"a grid of the usual positions and position {position!r} were both asked for; leave one out. Several positions are a grid, too."
        )
    asked = Asked(target, ",".join(positions_in(AT if position is None else position)), split, n_folds, n_repeats, seed)
    of = target_of(run.questions(), target, positive)
    if transfer:
        refuse_several(of, "transfer")
    judge = judge_of(of, asked)
    sites, embedding = sites_of(run.keys, of.questions, keys)
    others = others_of(of, asked, transfer, sites)
    positions = _positions_of(asked, grid, [of.questions, *(other.questions for other, _ in others)])
    asked = replace(asked, position=",".join(positions.positions))
    spots, of_embedding = spots_of(sites, positions.positions), spots_of(embedding, positions.positions)
    kept = KeptPlaces.of(
        folder, asked, [of, *(other for other, _ in others)], [each.name for each in (*spots, *of_embedding)]
    )
    expect(len(of_embedding) + len(spots) * (1 + len(others) + random_model) + len(of.questions) * random_model)
    drawn = None
    if random_model:
        drawn = with_random_weights(ready_random_model(run, sites, seed), of, judge, spots, advance)
    shuffles = shuffled_labels(of.labels, of.questions.groups, seed)
    places = probed(
        [*spots, *of_embedding],
        lambda spot: rows_of(of.questions, spot.site, spot.position),
        of.labels,
        judge.repeats,
        shuffles,
        advance,
        kept.place,
    )
    own = Learned.at_best(of, judge, spots, [each.found for each in places[: len(spots)]])
    result = _result(own, asked, places[: len(spots)], places[len(spots) :], drawn, shuffles[0])
    more: dict[str, Any] = {"grid": {"left_out": positions.left_out}} if len(positions.positions) > 1 else {}
    if others:
        further = [learned(*each, spots, advance, partial(kept.found, number)) for number, each in enumerate(others, 2)]
        every = [own, *further]
        more["transfer"] = {"runs": [each.about() for each in every], "cells": transfers(every, asked)}
    return replace(result, measured={**result.measured, **more})


def _runs_of(run: Any, transfer: Any) -> tuple[Run, list[Run]]:
    """The open runs. Raises SelectionError for what is no run and no path, and for further runs that are no list."""
    if isinstance(transfer, str | Path | Run):
        raise SelectionError("transfer is a list of runs; write transfer=[…].")
    for each in (run, *transfer):
        if not isinstance(each, str | Path | Run):
            raise SelectionError(f"{type(each).__name__} is no run; give open_run(path), or the path.")
    return as_run(run), [as_run(each) for each in transfer]


def _positions_of(asked: Asked, is_usual: bool, several: Sequence[Questions]) -> Grid:
    """The usual positions, or those that are asked for, which every question of several runs has to have: told before anything is learned."""
    if is_usual:
        return grid_of(several)
    positions = positions_in(asked.position)
    for each in positions:
        for questions in several:
            questions.row_numbers(each)
    return Grid(positions)


def _result(
    own: Learned,
    asked: Asked,
    places: Sequence[Place],
    embedding: Sequence[Place],
    drawn: OutOfFold | None,
    shuffled: Array,
) -> Result:
    of, judge, found = own.of, own.judge, own.found
    best = judge(found)
    top, *_ = own.counted
    strength = usual_strength(next(each.found.probes for each in places if each.spot == top))
    of_best = judge.auroc(found.log_odds)
    listed, checked = _compared(own, asked, of_best, embedding, drawn)
    listed.append(_with_shuffled_labels(of, asked, judge, top, shuffled))
    measured = {
        "findings": findings(best, [*listed, *checked], of, [each.position for each in own.counted]),
        "run": {"path": of.questions.source.path.name, "model": of.questions.source.contents.model},
        "classes": of.about(len(np.unique(judge.units))),
        "best": {
            "judged": best,
            "site": top.site,
            "position": top.position,
            "places": own.named,
            "strength": strength,
            **_by_class(own),
        },
        "places": _judged_places(judge, places, of_best, asked),
        "baselines": listed,
        "checks": checked,
        "questions": by_question(of, found),
    }
    return Result("probe", measured, _settings(asked, judge), _methods(asked, len(places)))


def _compared(
    own: Learned, asked: Asked, of_best: intervals.Share, embedding: Sequence[Place], drawn: OutOfFold | None
) -> tuple[list[JudgedBaseline], list[JudgedBaseline]]:
    """The baselines of the report, and the checks of the audit alone, in the folds of the probe. of_best: the AUROC of the best place."""
    of, judge, (top, *_) = own.of, own.judge, own.counted
    given = baselines(of.questions, asked.target)
    looked = [place_of_right_choice(of.questions, asked.target), _first_token(of.questions, top)]
    n_compared = sum(each.rows is not None for each in (*given, *looked)) + bool(embedding) + (drawn is not None)

    def judged(each: Baseline) -> JudgedBaseline:
        if each.rows is None:
            return JudgedBaseline(each.name, each.told, None, each.reason)
        said = out_of_fold(each.rows, of.labels, judge.repeats, each.strengths)
        return JudgedBaseline(each.name, each.told, judge(said, n_compared, of_best), n_known=each.n_known)

    listed = [judged(each) for each in given]
    of_embedding = JudgedBaseline(
        "embedding", "the embedding layer", None, "the run has none, or it is the place itself"
    )
    if embedding:
        told, _ = best_of([each.found for each in embedding], judge.repeats)
        of_embedding = replace(of_embedding, judged=judge(told, n_compared, of_best), reason=None)
    listed.append(of_embedding)
    if drawn is not None:
        told_of = f"the same model with random weights (seed {asked.seed})"
        listed.append(JudgedBaseline("random_model", told_of, judge(drawn, n_compared, of_best)))
    return listed, [judged(each) for each in looked]


def _by_class(own: Learned) -> dict[str, dict[str, Estimate]]:
    """The AUROC of each of several classes, at the best place."""
    if not own.of.is_several:
        return {}
    return {"by_class": dict(zip(own.of.classes, own.judge.by_class(own.found.log_odds), strict=True))}


def _judged_places(judge: Judge, places: Sequence[Place], best: intervals.Share, asked: Asked) -> list[JudgedPlace]:
    along = [judge.auroc(each.along_means) for each in places]
    ps: Sequence[float | None] = [None] * len(places)
    if asked.split == "question":
        ps = p_values([each.value for each in along], [each.shuffled for each in places])
    n = len(places)
    return [
        JudgedPlace(place.spot.site, place.spot.position, judge(place.found, n, best), judge.estimate(share, n), p)
        for place, share, p in zip(places, along, ps, strict=True)
    ]


def _with_shuffled_labels(of: Target, asked: Asked, judge: Judge, spot: Spot, labels: Array) -> JudgedBaseline:
    """The whole of it once more, with labels that were given to other questions: folds, strengths and probes."""
    n_folds = len(judge.repeats[0])
    repeats = list(folds(labels, judge.units, n_folds, asked.n_repeats, asked.seed))
    rows = rows_of(of.questions, spot.site, spot.position)
    found = out_of_fold(lambda _: rows, labels, repeats)
    return JudgedBaseline(
        "shuffled", f"shuffled labels, {spot.name}", Judge(labels, judge.units, repeats)(found, STRICT)
    )


def _first_token(questions: Questions, spot: Spot) -> Baseline:
    """The row of the prompt's first token, which has seen no other."""
    told = f"{spot.site} at the first token of the prompt"
    if spot.position == "prompt[0]":
        return Baseline("first_token", told, None, "it is where the probe is")
    try:
        rows = rows_of(questions, spot.site, "prompt[0]")
    except StoreError:
        return Baseline("first_token", told, None, "the run did not keep it")
    if not np.ptp(rows, axis=0).any():
        return Baseline("first_token", told, None, "all prompts begin with the same token")
    return Baseline("first_token", told, lambda _: rows)


def _settings(asked: Asked, judge: Judge) -> dict[str, Any]:
    return {**asdict(asked), "positions": list(positions_in(asked.position)), "n_folds": len(judge.repeats[0])}


def _methods(asked: Asked, n_places: int) -> dict[str, Any]:
    told = methods(n_places, p=P_METHOD if asked.split == "question" else None)
    return {
        **told,
        "interval": intervals.METHOD,
        "probe": "logistic regression, L2, standardised rows; the strength has the smallest log loss on the fold after the tested one",
        "best": "the place with the highest AUROC where strengths were chosen, fold by fold; of places that as many folds chose, the one with the highest mean of that AUROC is named first",
        "near_duplicates": duplicates.METHOD,
    }

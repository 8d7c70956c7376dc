"""Probes of one run, judged on another: a matrix of the run that was learned from and the run that is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.across.shared_questions import NOBODY, judges_of, names_of
from AutomaticEval.analysis.probes.asked import Asked, judge_of, rows_of
from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.grid.spots import Spot
from AutomaticEval.analysis.probes.intervals import Share, auroc_within_folds, estimate
from AutomaticEval.analysis.probes.judged import Judge
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold, best_of, out_of_fold
from AutomaticEval.analysis.probes.places import at_each
from AutomaticEval.analysis.probes.target import Target, target_of
from AutomaticEval.analysis.result import Estimate
from AutomaticEval.errors import SelectionError, StoreError, warn
from AutomaticEval.settings import MODEL
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
ALIKE = ("reduce", "project", "shape")
"""Settings that must be the same where rows of one run are given to probes of another."""


@dataclass(frozen=True)
class Transfer:
    """Probes that learned from one run, judged on another, or on the rest of the same one."""

    train: int
    """The number of the run that was learned from, and where the place was chosen."""

    test: int
    """The number of the run that is judged."""

    auroc: Estimate
    below_own: Estimate | None
    """AUROC of the judged run's own probes minus this, over the same questions. None where it is their own."""

    n_shared: int
    """Judged questions that are in both runs. Each is judged by a probe that has not learned from it."""

    n_left_out: int
    """Questions that are not judged, since each probe has learned from them."""


@dataclass(frozen=True)
class Learned:
    """A run with its probes."""

    of: Target
    judge: Judge
    found: OutOfFold
    """At the place that was best, fold by fold."""

    spots: Sequence[Sequence[Spot]]
    """[n_repeats][n_folds]: that place."""

    chosen_on: Mapping[Spot, float]
    """Place -> its mean AUROC where strengths were chosen, inside training parts: what breaks a tie of places that as many folds chose."""

    @classmethod
    def at_best(cls, of: Target, judge: Judge, spots: Sequence[Spot], places: Sequence[OutOfFold]) -> Learned:
        """The place is chosen inside each fold's training part."""
        found, chosen = best_of(places, judge.repeats)
        chosen_on = {spot: float(each.chosen_on.mean()) for spot, each in zip(spots, places, strict=True)}
        return cls(of, judge, found, [[spots[number] for number in each] for each in chosen.tolist()], chosen_on)

    @property
    def counted(self) -> dict[Spot, int]:
        """Place -> in how many folds it was chosen, the most frequent first; of as frequent ones, the one with the higher `chosen_on`."""
        counted = Counter(spot for each in self.spots for spot in each)
        return dict(sorted(counted.items(), key=lambda each: (-each[1], -self.chosen_on[each[0]])))

    @property
    def named(self) -> dict[str, int]:
        """The same by the places' names, for files."""
        return {spot.name: n for spot, n in self.counted.items()}

    def about(self) -> dict[str, Any]:
        """What a result says of the run."""
        source, labels = self.of.questions.source, self.of.labels
        told = {"path": source.path.name, "model": source.contents.model}
        return told | {
            "n_positive": int(labels.sum()),
            "n_negative": int((1 - labels).sum()),
            "places": self.named,
        }


def others_of(of: Target, asked: Asked, runs: Sequence[Run], keys: Sequence[str]) -> list[tuple[Target, Judge]]:
    """The classes and folds of further runs, checked before anything is learned.

    Raises StoreError for a run that lacks a place or a class, or has too few questions; SelectionError for rows that cannot be compared.
    """
    made = []
    for run in runs:
        other = target_of(run.questions(), asked.target, of.positive)
        _check(of, other, keys)
        try:
            made.append((other, judge_of(other, asked)))
        except StoreError as failure:
            raise StoreError(f"{run.path}: {failure}") from None
    return made


def _check(of: Target, other: Target, keys: Sequence[str]) -> None:
    one, two = of.questions.source, other.questions.source
    settings = one.contents.settings, two.contents.settings
    for name in ALIKE:
        if settings[0].get(name) != settings[1].get(name):
            raise SelectionError(
                f"{one.path} and {two.path} cannot be compared: {name} is {settings[0].get(name)} in the first and {settings[1].get(name)} in the second. A "
                "probe of one model's rows says nothing of another architecture's."
            )
    for key in keys:
        widths = [each.rows(each.key(key), np.zeros(0, np.int64)).shape[-1] for each in (one, two)]
        if widths[0] != widths[1]:
            raise SelectionError(
                f"{key} has {widths[0]} numbers in {one.path} and {widths[1]} in {two.path}: a probe of one cannot read the other. Give runs of one model."
            )
    if {of.negative, of.positive} != {other.negative, other.positive} and not of.negative.startswith("the other"):
        raise SelectionError(
            f"{of.name} is {of.positive} or {of.negative} in {one.path}, and {other.positive} or {other.negative} in {two.path}; name the value that is told "
            "from all others (positive=, --positive)."
        )
    if one.contents.model != two.contents.model or settings[0].get(MODEL) != settings[1].get(MODEL):
        warn(
            f"{one.path} is of {one.contents.model}, and {two.path} of {two.contents.model} with other numbers: a probe of one is asked about the activations "
            "of the other, which means something only if one was made from the other (fine-tuned, edited, quantised)."
        )


def learned(
    of: Target,
    judge: Judge,
    spots: Sequence[Spot],
    advance: Callable[[int], None],
    kept: Callable[[str, Callable[[], OutOfFold]], OutOfFold] = lambda _, compute: compute(),
) -> Learned:
    """The probes of a further run, a place at a time. kept: as for `places.probed`, by the place's name."""

    def computed(spot: Spot) -> OutOfFold:
        rows = rows_of(of.questions, spot.site, spot.position)
        return out_of_fold(lambda _: rows, of.labels, judge.repeats)

    def one(spot: Spot) -> OutOfFold:
        found = kept(spot.name, lambda: computed(spot))
        advance(1)
        return found

    return Learned.at_best(of, judge, spots, at_each(spots, one))


def transfers(runs: Sequence[Learned], asked: Asked) -> list[Transfer]:
    """Every run's probes, judged on every run, row by row of the matrix."""
    own = [run.judge.auroc(run.found.log_odds) for run in runs]
    n, names = len(runs) ** 2, [names_of(run.of.questions, asked.split) for run in runs]
    made = []
    for train, test in product(range(len(runs)), repeat=2):
        if train == test:
            made.append(Transfer(train, test, runs[test].judge.estimate(own[test], n), None, 0, 0))
            continue
        one, other = runs[train], runs[test]
        judges = judges_of(names[train], one.judge.repeats, names[test], other.of.labels, other.judge.units, asked.seed)
        share = _share(one, other, judges.of_repeats)
        told = judges.n_shared, int((~_judged(judges.of_repeats)).sum())
        below = None if share is None else _estimate(own[test] - share, other, judges.of_repeats, n)
        made.append(Transfer(train, test, _estimate(share, other, judges.of_repeats, n), below, *told))
    return made


def _share(one: Learned, other: Learned, judges: Sequence[Array]) -> Share | None:
    """The AUROC of a run's probes on another run, within folds. None where no fold judges both labels."""
    labels = other.of.labels
    log_odds, repeats = np.zeros((len(judges), len(labels))), []
    nobody = np.array([], int)
    for fold_of, whole in zip(judges, one.judge.repeats, strict=True):
        repeats.append([Fold(nobody, nobody, np.flatnonzero(fold_of == number)) for number in range(len(whole))])
    for spot in one.counted:
        rows = rows_of(other.of.questions, spot.site, spot.position)
        for repeat, spots in enumerate(one.spots):
            for number in (number for number, each in enumerate(spots) if each == spot):
                test = repeats[repeat][number].test
                log_odds[repeat, test] = one.found.probes[repeat][number].log_odds(rows[test])
    if not any(len(np.unique(labels[fold.test])) == 2 for whole in repeats for fold in whole):
        return None
    return auroc_within_folds(log_odds, labels, repeats)


def _estimate(share: Share | None, other: Learned, judges: Sequence[Array], n_comparisons: int) -> Estimate:
    """Over the questions that were judged."""
    judged = _judged(judges)
    if share is None:
        return Estimate(None, None, int(judged.sum()), reason="no probe may judge questions of both classes.")
    units, labels = other.judge.units[judged], other.of.labels[judged]
    return estimate(Share(share.value, share.influence[judged], share.is_difference), units, labels, n_comparisons)


def _judged(judges: Sequence[Array]) -> Array:
    """[n_questions]: whether some probe judges the question."""
    judged: Array = np.any([each != NOBODY for each in judges], axis=0)
    return judged

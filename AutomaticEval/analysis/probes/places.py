"""Probes at each place of a run, a place at a time from the disk, as many places at once as there are processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.grid.spots import Spot
from AutomaticEval.analysis.probes.linear import standardised
from AutomaticEval.analysis.probes.measures import auroc
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold, out_of_fold
from AutomaticEval.analysis.probes.several.sides import sides_of

Array = np.ndarray[Any, Any]
Repeats = Sequence[Sequence[Fold]]
Made = TypeVar("Made")
N_SHUFFLES = 200
MOST_AT_ONCE = min(4, os.cpu_count() or 1)
"""Places that are in memory together."""


@dataclass(frozen=True)
class Place:
    """What probes at one place said of each question."""

    spot: Spot
    found: OutOfFold
    """Of the logistic probe."""

    along_means: Array
    """[n_repeats, n_questions]: how far each question lies along the difference of means of the questions that were learned from.
    Of several classes [n_classes, n_repeats, n_questions], each against the rest."""

    shuffled: Array
    """[n_shuffles]: the AUROC of the difference of means with each of the shuffled labels."""


def probed(
    spots: Sequence[Spot],
    read: Callable[[Spot], Array],
    labels: Array,
    repeats: Repeats,
    shuffles: Array,
    advance: Callable[[int], None],
    kept: Callable[[Spot, Callable[[], Place]], Place] = lambda _, compute: compute(),
) -> list[Place]:
    """read: gives [n_questions, width], float32, of a spot. shuffles: [n_shuffles, n_questions]: other labels. advance: is told of each place.

    kept: gives a place that is done already, or lets it be computed.
    """

    def computed(spot: Spot) -> Place:
        rows = read(spot)
        found = out_of_fold(lambda _: rows, labels, repeats)
        return Place(spot, found, *along_means(rows, labels, repeats, shuffles))

    def one(spot: Spot) -> Place:
        place = kept(spot, lambda: computed(spot))
        advance(1)
        return place

    return at_each(spots, one)


def at_each(spots: Sequence[Spot], one: Callable[[Spot], Made]) -> list[Made]:
    """What `one` makes of each place, as many places at once as there are processors."""
    with (
        threadpool_limits(1),
        ThreadPoolExecutor(MOST_AT_ONCE) as pool,
    ):  # the sums are in libraries that let go of Python's lock
        return list(pool.map(one, spots))


def along_means(rows: Array, labels: Array, repeats: Repeats, shuffles: Array) -> tuple[Array, Array]:
    """How far each question lies along the difference of means of its fold's training part, and the AUROC of each of the shuffled labels.

    Of several classes, each is told from the rest, and the AUROC of shuffled labels is the mean over classes.
    """
    sides, others = sides_of(labels), sides_of(shuffles, int(labels.max()) + 1)
    made = [_along_means(rows, side, repeats, other) for side, other in zip(sides, others, strict=True)]
    if len(made) == 1:
        return made[0]
    return np.stack([along for along, _ in made]), np.mean([of_shuffles for _, of_shuffles in made], axis=0)


def _along_means(rows: Array, labels: Array, repeats: Repeats, shuffles: Array) -> tuple[Array, Array]:
    """Of two classes. All labels are taken together: the differences of means are one product of matrices."""
    sides = np.vstack([labels, shuffles]).astype(rows.dtype)  # [1 + n_shuffles, n_questions]
    along, of_shuffles = np.empty((len(repeats), len(labels))), []
    for repeat, whole in enumerate(repeats):
        for fold in whole:
            shift, scale = standardised(rows[fold.train])
            learned = sides[:, fold.train]
            n_true = learned.sum(1, keepdims=True)
            weights = learned / np.maximum(1, n_true) - (1 - learned) / np.maximum(1, learned.shape[1] - n_true)
            directions = (weights @ rows[fold.train]) / scale  # the shift is in both means
            scores = ((rows[fold.test] - shift) / scale) @ directions.T
            along[repeat, fold.test] = scores[:, 0]
            of_shuffles.append(
                [auroc(said, true[fold.test]) for said, true in zip(scores[:, 1:].T, shuffles, strict=True)]
            )
    with np.errstate(invalid="ignore"):
        return along, np.nanmean(np.array(of_shuffles).reshape(-1, len(shuffles)), axis=0)


def shuffled_labels(labels: Array, groups: Array, seed: int, n: int = N_SHUFFLES) -> Array:
    """[n, n_questions]: labels, or numbers of classes, that were given to other questions. Groups of one size exchange all their labels, so that answers to one prompt stay together."""
    draw = np.random.default_rng([seed, 1])
    order = np.argsort(groups, kind="stable")
    _, sizes = np.unique(groups, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    shuffled = np.tile(labels, (n, 1))
    for size in np.unique(sizes):
        members = order[starts[sizes == size][:, None] + np.arange(size)]  # [n_groups, size]
        for each in shuffled:
            each[members] = labels[members[draw.permutation(len(members))]]
    return shuffled


def p_values(along: Sequence[float], shuffled: Sequence[Array]) -> list[float]:
    """For each place how often shuffled labels give as high an AUROC at any place: corrected for all of them.

    Source: the single-step maxT procedure, Westfall and Young 1993.
    """
    highest = np.stack(shuffled).max(0)
    return [float((1 + (highest >= value - 1e-12).sum()) / (1 + len(highest))) for value in along]

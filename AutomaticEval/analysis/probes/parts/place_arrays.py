"""What probes said at a place, as arrays for a file, and back: to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.grid.spots import Spot
from AutomaticEval.analysis.probes.linear import Linear
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold
from AutomaticEval.analysis.probes.places import Place
from AutomaticEval.analysis.probes.several.one_vs_rest import OneVsRest

Array = np.ndarray[Any, Any]
Probe = Linear | OneVsRest


def arrays_of_place(place: Place) -> dict[str, Array]:
    """Those of `arrays_of`, with along_means and shuffled."""
    return {**arrays_of(place.found), "along_means": place.along_means, "shuffled": place.shuffled}


def place_of(spot: Spot, arrays: Mapping[str, Array]) -> Place:
    """The place whose arrays these are."""
    return Place(spot, found_of(arrays), arrays["along_means"], arrays["shuffled"])


def arrays_of(found: OutOfFold) -> dict[str, Array]:
    """log_odds and chosen_on, and of the probes shift and scale [n_repeats, n_folds, width], weights [n_repeats, n_folds, n_sides, width], bias and strength [n_repeats, n_folds, n_sides]."""
    sides = [[_sides(each) for each in whole] for whole in found.probes]
    shared = {
        name: np.array([[getattr(of_fold[0], name) for of_fold in whole] for whole in sides])
        for name in ("shift", "scale")  # rows are standardised once for all sides
    }
    own = {
        name: np.array([[[getattr(each, name) for each in of_fold] for of_fold in whole] for whole in sides])
        for name in ("weights", "bias", "strength")
    }
    return {"log_odds": found.log_odds, "chosen_on": found.chosen_on, **shared, **own}


def found_of(arrays: Mapping[str, Array]) -> OutOfFold:
    """What was said, with its probes."""
    n_repeats, n_folds = arrays["chosen_on"].shape
    probes = [[_probe(arrays, repeat, fold) for fold in range(n_folds)] for repeat in range(n_repeats)]
    return OutOfFold(arrays["log_odds"], arrays["chosen_on"], probes)


def _sides(probe: Probe) -> Sequence[Linear]:
    return probe.probes if isinstance(probe, OneVsRest) else [probe]


def _probe(arrays: Mapping[str, Array], repeat: int, fold: int) -> Probe:
    shift, scale, weights, bias, strength = (
        arrays[name][repeat, fold] for name in ("shift", "scale", "weights", "bias", "strength")
    )
    made = [Linear(shift, scale, *each) for each in zip(weights, bias.tolist(), strength.tolist(), strict=True)]
    return made[0] if len(made) == 1 else OneVsRest(made)

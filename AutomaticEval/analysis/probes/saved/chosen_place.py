"""The place that a probe or a direction is saved of: in how many folds it was chosen, and what it tells alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from AutomaticEval.analysis.probes.judged import JudgedPlace
from AutomaticEval.analysis.result import Result
from AutomaticEval.errors import warn


@dataclass(frozen=True)
class ChosenPlace:
    """The first of the places that folds chose."""

    name: str
    judged: JudgedPlace
    """The place alone, in all folds, and not the choice among places."""

    n_chosen: int
    n_folds: int
    """Of all repeats."""

    @property
    def told(self) -> str:
        """`chosen in 3 of 5 folds`."""
        return f"chosen in {self.n_chosen} of {self.n_folds} folds"

    def about(self) -> dict[str, Any]:
        """What a file says of it."""
        return {"chosen_in": self.n_chosen, "n_folds": self.n_folds}


def chosen_place(result: Result) -> ChosenPlace:
    """result: of `probe`."""
    best = result.measured["best"]
    (judged,) = (
        each for each in result.measured["places"] if (each.site, each.position) == (best["site"], best["position"])
    )
    name, n_chosen = next(iter(best["places"].items()))
    return ChosenPlace(name, judged, n_chosen, sum(best["places"].values()))


def warn_of_few(place: ChosenPlace) -> None:
    """Warns where fewer than half of the folds chose the place that is saved."""
    if 2 * place.n_chosen < place.n_folds:
        warn(
            f"{place.name} was {place.told}: folds differ in the best place, and what is saved is of this one alone, whose own AUROC is "
            f"{place.judged.probe.auroc.mean:.3f}."
        )

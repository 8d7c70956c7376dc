"""The direction between the classes of a probe, for steering and editing."""

from __future__ import annotations

from dataclasses import replace

from AutomaticEval.analysis.probes.saved.chosen_place import chosen_place, warn_of_few
from AutomaticEval.analysis.probes.target import refuse_several, target_of
from AutomaticEval.analysis.result import Result
from AutomaticEval.analysis.steering.difference import difference_of_means
from AutomaticEval.analysis.steering.direction import Direction
from AutomaticEval.store.run import Run


def best_direction(run: Run, result: Result) -> Direction:
    """The mean row of a class minus that of the other, over all questions, at the place that folds chose most often.

    result: of `probe` over this run. It is the difference of means, and not the weights of the logistic probe: it is what moves activations from one
    class to the other. `made_from` has auroc and p of the difference of means at this place. Warns where fewer than half of the folds chose it. Raises SelectionError for rows that were reduced, and for several classes.
    """
    classes, best = result.measured["classes"], result.measured["best"]
    of = target_of(run.questions(), classes["target"], classes["positive"])
    refuse_several(of, "a direction")
    place = chosen_place(result)
    warn_of_few(place)
    direction = difference_of_means(of.questions, best["site"], of.labels.astype(bool).tolist(), best["position"])
    told = f"{classes['target']}: {classes['positive']} against {classes['negative']}"
    return replace(
        direction,
        made_by=f"difference of means of {told}, over {run.path.name}, at {best['position']}, the best place of a probe ({place.told})",
        made_from={
            **direction.made_from,
            "label": told,
            "auroc": place.judged.difference_of_means.mean,
            "p": place.judged.p,
            **place.about(),
        },
    )

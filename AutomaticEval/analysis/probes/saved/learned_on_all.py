"""The probe that is kept: learned from all questions of a run, at the place and with the strength that were chosen most often."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from AutomaticEval.analysis.probes.across.shared_questions import names_of
from AutomaticEval.analysis.probes.asked import rows_of
from AutomaticEval.analysis.probes.linear import Linear, logistic
from AutomaticEval.analysis.probes.saved.chosen_place import ChosenPlace, chosen_place, warn_of_few
from AutomaticEval.analysis.probes.saved.saved_probe import SavedProbe
from AutomaticEval.analysis.probes.several.one_vs_rest import OneVsRest, most_frequent
from AutomaticEval.analysis.probes.target import refuse_several, target_of
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.settings import MODEL
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run


def usual_strength(probes: Sequence[Sequence[Linear | OneVsRest]]) -> float:
    """The strength that folds chose most often; of several, the smallest number, which regularises most."""
    return most_frequent([each.strength for whole in probes for each in whole if each.strength is not None])


def learn_probe(run: Run, result: Result) -> SavedProbe:
    """The logistic probe of all questions, at the place that folds chose most often, with the strength chosen there most often.

    result: of `probe` over this run. Warns where fewer than half of the folds chose the place. Raises SelectionError for rows that were reduced, and for several classes.
    """
    refuse_reduced(run.settings, "a saved probe")
    classes, best, settings = result.measured["classes"], result.measured["best"], dict(result.settings or {})
    of = target_of(run.questions(), classes["target"], classes["positive"])
    refuse_several(of, "a saved probe")
    place = chosen_place(result)
    warn_of_few(place)
    made = logistic(rows_of(of.questions, best["site"], best["position"]), of.labels, best["strength"])
    weights, shift, scale = (torch.as_tensor(each).float() for each in (made.weights, made.shift, made.scale))
    return SavedProbe(
        weights,
        shift,
        scale,
        torch.tensor([made.bias]).float(),
        torch.tensor(sorted(set().union(*known_again(of.questions)))),
        best["site"],
        best["position"],
        of.name,
        of.positive,
        of.negative,
        best["strength"],
        len(of.labels),
        of.questions.source.contents.model,
        run.settings.get(MODEL),
        in_chat_template(run),
        {"run": run.path.name, **_aurocs(best["judged"].auroc, place), "split": settings["split"]},
    )


def _aurocs(whole: Estimate, place: ChosenPlace) -> dict[str, Any]:
    """Out of fold: of choosing a place fold by fold, and of this place alone."""
    alone = place.judged.probe.auroc
    return {
        "auroc_out_of_fold": whole.mean,
        "interval_out_of_fold": None if whole.interval is None else list(whole.interval),
        "auroc_of_place": alone.mean,
        "interval_of_place": None if alone.interval is None else list(alone.interval),
        **place.about(),
    }


def in_chat_template(run: Run) -> bool:
    """Whether the run's prompts were put into the model's chat template."""
    settings = run.settings
    return bool(settings.get("chat_template") or (settings.get("benchmark") or {}).get("apply_chat_template"))


def known_again(questions: Questions) -> list[set[int]]:
    """Of each question the hashes by which it is known again in another run: of its words, and of its task and document."""
    return [{_hash(repr(name)) for name in names} for names in names_of(questions, "question")]


def _hash(text: str) -> int:
    """64 bits, signed."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)

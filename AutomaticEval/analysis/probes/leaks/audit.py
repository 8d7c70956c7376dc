"""The audit of leaks: reasons why a label can be told without the model knowing anything. Findings are told before any number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.probes.judged import Judged, JudgedBaseline
from AutomaticEval.analysis.probes.leaks.duplicates import ALIKE, near_duplicates
from AutomaticEval.analysis.probes.target import Target
from AutomaticEval.analysis.result import Estimate
from AutomaticEval.store.questions.response_tokens import is_in_prompt

Array = np.ndarray[Any, Any]
CHANCE = 0.5
ROUNDING = 1e-9
"""Scores that are all equal have an AUROC of 0.5, but for rounding."""
TEXTS = ("question_length", "answer_length", "task", "question_words", "answer_words", "random_model")
"""Baselines that know nothing but texts: where one of them is as good as the probe, the probe may read no more than that."""
FOLLOWS = {
    "answer_length": "the length of the answer",
    "question_length": "the length of the question",
    "right_choice": "the place of the right choice",
    "embedding": "the token itself, before any layer (embedding)",
    "first_token": "the first token of the prompt",
}
"""Baseline -> what the label follows if it is above chance."""
OWN = {
    "confidence": "the model's own confidence",
    "margin": "the model's own margin",
    "logprob": "the log-probability of the model's own answer",
    "mean_logprob": "the mean log-probability of the model's own answer",
}
"""Baselines that are how sure the model is of its answer."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with the question that a probe is to answer."""

    name: str
    text: str
    is_grave: bool = False
    """Whether no number of the result can be believed."""


def findings(
    best: Judged, baselines: Sequence[JudgedBaseline], target: Target, positions: Sequence[str]
) -> list[Finding]:
    """What is found, the gravest first. baselines: those of the result, with right_choice and first_token. positions: of the places that folds chose."""
    known = {each.name: each.judged for each in baselines if each.judged is not None}
    told = {each.name: each.told for each in baselines}
    return [
        *_shuffled(known.pop("shuffled", None)),
        *_position(positions),
        *_texts(best, known, told),
        *_own(best, baselines, target.name),
        *_partly_known(baselines, target),
        *_follows(known, target.name),
        *_duplicates(target),
        *_chance(best.auroc, target.name),
    ]


def _shuffled(judged: Judged | None) -> list[Finding]:
    if judged is None or not is_off_chance(judged.auroc):
        return []
    text = f"with shuffled labels the probe is not at chance (AUROC {number(judged.auroc)}): believe no number here."
    return [Finding("shuffled", text, True)]


def _position(positions: Sequence[str]) -> list[Finding]:
    told = ", ".join(dict.fromkeys(each for each in positions if not is_in_prompt(each)))
    if not told:
        return []
    text = f"the rows at {told} are inside the answer's text, or after it: the probe may read what was answered, not what was known before."
    return [Finding("position_in_answer", text)]


def _texts(best: Judged, known: dict[str, Judged], told: dict[str, str]) -> list[Finding]:
    """Text baselines that are above chance, and not below the interval of the best probe."""
    low = (best.auroc.interval or (best.auroc.mean or 0.0, 0.0))[0]
    return [
        Finding(
            f"as_good_as_probe:{name}",
            f"{told[name]} tells the classes apart {_beside(judged)} the best probe: AUROC {number(judged.auroc)}, probe {number(best.auroc)}.",
        )
        for name, judged in known.items()
        if name in TEXTS and is_above_chance(judged.auroc) and (judged.auroc.mean or 0.0) >= low
    ]


def _beside(judged: Judged) -> str:
    """By the interval of the paired difference."""
    below = judged.below_best
    is_better = below is not None and below.interval is not None and below.interval[1] < 0
    return "better than" if is_better else "about as well as"


def _own(best: Judged, baselines: Sequence[JudgedBaseline], target: str) -> list[Finding]:
    """The best baseline of the model's own confidence, above chance, where the paired difference does not show that the probe is better."""
    found = _best_own(baselines)
    if found is None or found.judged is None or not is_above_chance(found.judged.auroc):
        return []
    judged, below = found.judged, found.judged.below_best
    if below is None or (below.interval is not None and below.interval[0] > 0):
        return []
    what = "right from wrong" if target == "correct" else f"{target} apart"
    end = "is worse" if _beside(judged) == "better than" else "does not beat it"
    text = f"{OWN[found.name]} tells {what}: AUROC {number(judged.auroc)}; the best probe, {number(best.auroc)}, {end}."
    return [Finding(f"own_confidence:{found.name}", text)]


def _partly_known(baselines: Sequence[JudgedBaseline], target: Target) -> list[Finding]:
    """The best baseline of the model's own confidence, where only some questions have it."""
    best = _best_own(baselines)
    n = len(target.questions)
    if best is None or best.n_known in (None, n):
        return []
    several = len(set(target.questions.column("task"))) > 1
    remedy = (
        "compare one task at a time: run.where(task=…), --task" if several else "compare the questions that have it"
    )
    text = f"{OWN[best.name]} is known for {best.n_known} of {n} questions, and is a fair baseline for these alone: {remedy}."
    return [Finding(f"partly_known:{best.name}", text)]


def _best_own(baselines: Sequence[JudgedBaseline]) -> JudgedBaseline | None:
    """Of the model's own confidence, the baseline with the highest AUROC."""
    own = [(each.judged.auroc.mean or 0.0, each) for each in baselines if each.name in OWN and each.judged is not None]
    return max(own, key=lambda each: each[0], default=(0.0, None))[1]


def _follows(known: dict[str, Judged], target: str) -> list[Finding]:
    return [
        Finding(
            f"follows:{name}",
            f"{target} follows {what}: AUROC {number(known[name].auroc)} from that alone.",
        )
        for name, what in FOLLOWS.items()
        if name in known and is_above_chance(known[name].auroc)
    ]


def _duplicates(target: Target) -> list[Finding]:
    questions = target.questions
    pairs = near_duplicates(questions.column("question"), questions.column("task"), questions.groups)
    if not pairs:
        return []
    several = sorted({number for pair in pairs for number in pair})
    one, other = (questions[number].name for number in pairs[0])
    text = (
        f"{len(several)} of {len(questions)} questions are near duplicates of another (the same to {ALIKE:.0%} or more), and may be on both sides of a "
        f"split, such as {one} and {other}."
    )
    return [Finding("near_duplicates", text)]


def _chance(auroc: Estimate, target: str) -> list[Finding]:
    if is_above_chance(auroc):
        return []
    return [Finding("at_chance", f"no probe tells {target} above chance: AUROC {number(auroc)} at the best place.")]


def is_above_chance(auroc: Estimate) -> bool:
    """By the interval of all that are compared together. Without an interval nothing is."""
    interval = auroc.simultaneous or auroc.interval
    return interval is not None and interval[0] > CHANCE + ROUNDING


def is_off_chance(auroc: Estimate) -> bool:
    """Above or below."""
    interval = auroc.simultaneous or auroc.interval
    return interval is not None and not interval[0] - ROUNDING <= CHANCE <= interval[1] + ROUNDING


def number(estimate: Estimate, sign: str = "") -> str:
    """`0.812 [0.771, 0.847]`; sign: `+` for differences."""
    if estimate.mean is None:
        return "none"
    ends = "" if estimate.interval is None else " [{}, {}]".format(*(f"{end:{sign}.3f}" for end in estimate.interval))
    return f"{estimate.mean:{sign}.3f}{ends}"

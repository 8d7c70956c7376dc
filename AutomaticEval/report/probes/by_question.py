"""Figures of what a probe says of single questions: whether its probabilities come true, and what is won by leaving out those it is least sure of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from AutomaticEval.report.labels import LINES, label, save
from AutomaticEval.report.probes.classes import chosen_told
from AutomaticEval.report.probes.curves import N_BINS, kept_share, reliability
from AutomaticEval.report.probes.grid import position_of

Array = np.ndarray[Any, Any]
Said = dict[str, tuple[Array, Array]]
"""Who says it -> probabilities and labels, [n] each."""
LEAST = 5
"""Bins of fewer questions are marks that no line joins."""
PROBE, MODEL = "probe", "the model's confidence"


def reliability_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a reliability diagram with the number of questions in each bin. result: of `probe`, as JSON."""
    positive = result["classes"]["positive"]
    true, event = ("right", "the likeliest class") if _is_several(result) else (positive, positive)
    said = _said(result)
    if positive != "true":
        said.pop(MODEL, None)  # which is of the answer that it gave, being right
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    figure.suptitle(_title(result), fontsize="medium")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, label="comes true as often as is said")
    width = 1 / N_BINS / len(said)
    for number, (who, (probabilities, labels)) in enumerate(said.items()):
        found, colour = reliability(probabilities, labels), LINES[number]
        above.scatter(found.said, found.true, s=_areas(found.n), color=colour, alpha=0.8, linewidths=0, zorder=3)
        held = found.n >= LEAST
        above.plot(found.said[held], found.true[held], color=colour, label=f"{who} ({len(labels)} questions)")
        places = np.arange(N_BINS) / N_BINS + (number + 0.5) * width
        bars = below.bar(places, found.n, width * 0.9, color=colour)
        below.bar_label(bars, [str(n) if n else "" for n in found.n], fontsize=6, padding=1)
    above.set(ylabel=label(f"share that is {true}"), xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    told = f"lines join bins of {LEAST} questions or more; marks' area: questions"
    above.legend(fontsize="small", loc="upper left", title=told, title_fontsize="x-small")
    below.set(xlabel=label(f"probability of {event}, in ten bins"), ylabel="questions")
    below.margins(y=0.18)
    save(figure, path, 150)


def _areas(n: Array) -> Array:
    """The area of each bin's mark, in points squared: it grows with the number of questions, and a single one can be seen."""
    areas: Array = 8 + 80 * n / max(1, n.max())
    return areas


def risk_coverage_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write the accuracy of what is kept when the least sure questions are left out. result: of `probe`, as JSON.

    For the target `correct` it is the model's accuracy, and the questions that are probably answered right are kept; for another it is the probe's
    accuracy, and those are kept whose probability is far from 1/2; of several classes, those whose likeliest one is the most probable.
    """
    is_models = result["classes"]["target"] == "correct"
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    right = np.zeros(0)
    for number, (who, (probabilities, labels)) in enumerate(_said(result).items()):
        if is_models:
            sureness, right = _of_right(result, who, probabilities, labels)
        else:
            sureness, right = _of_probe(result, probabilities, labels)
        right = right.astype(float)
        coverage = np.arange(1, len(right) + 1) / len(right)
        told = f"sure by {who}" if is_models else "sure by the probability"
        axes.plot(coverage, kept_share(sureness, right), color=LINES[number], label=f"{told} ({len(right)} questions)")
        if who == PROBE:
            axes.plot(
                coverage,
                kept_share(right, right),
                "--",
                color="0.3",
                linewidth=1,
                label="ideal: all wrong ones left out first",
            )
            axes.axhline(right.mean(), color="0.5", linewidth=0.8, label=f"left out at random ({right.mean():.3f})")
    axes.set(
        xlabel="share of the questions that is kept",
        ylabel=f"accuracy of {'the model' if is_models else 'the probe'} on what is kept",
        xlim=(0, 1.01),
        ylim=(-0.02, 1.03),
    )
    axes.set_title(_title(result), fontsize="medium")
    axes.legend(fontsize="small", loc="lower left")
    save(figure, path, 150)


def _said(result: Mapping[str, Any]) -> Said:
    """The probe's probabilities and, for the target `correct`, the model's confidence, over the questions that have one.

    Of several classes they are those of the likeliest one, and the labels say whether it is the right one.
    """
    questions = result["questions"]
    labels, probabilities = (np.array(questions[name], float) for name in ("label", "probability"))
    if _is_several(result):  # [n_questions, n_classes]
        return {PROBE: (probabilities.max(1), (probabilities.argmax(1) == labels).astype(float))}
    said = {PROBE: (probabilities, labels)}
    known = np.array([each is not None for each in questions["confidence"]], bool)
    if result["classes"]["target"] == "correct" and known.any():
        confidence = [each for each in questions["confidence"] if each is not None]
        said[MODEL] = (np.array(confidence, float), labels[known])
    return said


def _of_right(result: Mapping[str, Any], who: str, probabilities: Array, labels: Array) -> tuple[Array, Array]:
    """The probability that the model is right, and whether it is. `--positive false` has it the other way round."""
    if result["classes"]["positive"] == "true":
        return probabilities, labels
    return probabilities if who == MODEL else 1 - probabilities, 1 - labels


def _of_probe(result: Mapping[str, Any], probabilities: Array, labels: Array) -> tuple[Array, Array]:
    """How sure the probe is, and whether it is right."""
    if _is_several(result):
        return probabilities, labels
    return np.abs(probabilities - 0.5), (probabilities > 0.5) == labels.astype(bool)


def _is_several(result: Mapping[str, Any]) -> bool:
    return "counts" in result["classes"]


def _title(result: Mapping[str, Any]) -> str:
    places = result["best"]["places"]
    chosen = f"{next(iter(places))}, {chosen_told(places)}"
    at = "" if "grid" in result else f" at {position_of(result)}"  # where the place says it
    return label(f"{result['classes']['target']}{at}, best place ({chosen}):\n{result['run']['model']}, out of fold")

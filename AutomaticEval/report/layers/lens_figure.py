"""Figures of the logit lens over a run's questions, and of a tuned lens beside the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from AutomaticEval.report.bars import ends_of
from AutomaticEval.report.labels import LINES, by_kind, label, save

Places = Sequence[Mapping[str, Any]]
TOGETHER = "bands: 95 % intervals, of all places together"


def lens_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with four panels by layer. result: of `logit_lens`, as JSON."""
    places, settings = result["places"], result["settings"]
    figure = Figure(figsize=(11.5, 7.5), layout="constrained")
    tuned = ", tuned" if settings.get("tuned") else ""
    figure.suptitle(
        label(
            f"Logit lens{tuned} at {settings['position']}: {result['run']['model']} ({result['n_questions']} questions)"
        )
    )
    (choice, rank), (chance, spread) = figure.subplots(2, 2)
    _panel(
        choice, places, [("choice_accuracy", "own choice is right"), ("top_agreement", "top token is the last layer's")]
    )
    choice.set(title="What it answers", ylabel="share of questions", ylim=(-0.03, 1.03))
    _panel(rank, places, [("log_rank", "geometric mean")], np.exp)
    rank.set(title="Rank of the right answer's first token", ylabel="rank, 1 is the likeliest", yscale="log")
    _whole_ranks(rank)
    _panel(chance, places, [("gold_probability", "right answer"), ("taken_probability", "answer that was given")])
    chance.set(title="Probability of the first token", ylabel="probability", ylim=(-0.03, 1.03))
    _panel(spread, places, [("entropy", "entropy"), ("kl", "divergence from the model's own")])
    spread.set(title="How sure, and how far from the output", ylabel="nats")
    spread.set_ylim(bottom=min(0.0, spread.get_ylim()[0]))
    figure.supxlabel(f"layer (-1: the embeddings); {TOGETHER}", fontsize="small")
    save(figure, path, 150)


def tuned_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the held-out divergence of the plain and the tuned lens by layer. result: of `train_tuned_lens`, as JSON."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    n = result["n_prompts"]
    _panel(axes, result["places"], [("plain", "plain lens"), ("tuned", "tuned lens")])
    axes.set(
        title=label(
            f"Tuned lens of {result['run']['model']}: {n['train']} prompts learned from, {n['held_out']} held out"
        ),
        xlabel=f"layer (-1: the embeddings); {TOGETHER}",
        ylabel="divergence from the model's own (nats)",
    )
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    save(figure, path, 150)


def _panel(
    axes: Any, places: Places, measures: Sequence[tuple[str, str]], scale: Callable[[Any], Any] = lambda value: value
) -> None:
    """A line with its band for each measure and kind of site. scale: is put on the numbers."""
    kinds = by_kind(places)
    lines = [(kind, *measure) for kind in kinds for measure in measures]
    for number, (kind, name, told) in enumerate(lines):
        known = [(layer, each[name]) for layer, each in kinds[kind] if each[name]["mean"] is not None]
        if not known:
            continue
        layers = [layer for layer, _ in known]
        means = np.array([scale(each["mean"]) for _, each in known])
        ends = np.array([scale(np.array(ends_of(each) or (each["mean"],) * 2)) for _, each in known])
        colour = LINES[number % len(LINES)]
        text = told if set(kinds) <= {"resid_post", "embed"} else f"{kind}: {told}"
        shown = None if kind == "embed" and "resid_post" in kinds else label(text)
        if shown is None:
            colour = LINES[
                [each[1] for each in lines if each[0] == "resid_post"].index(name) + _first(lines, "resid_post")
            ]
        axes.plot(layers, means, "-o", color=colour, markersize=3.5, label=shown)
        if len(layers) > 1:
            axes.fill_between(layers, ends[:, 0], ends[:, 1], color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(layers, ends[:, 0], ends[:, 1], color=colour)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "no numbers", transform=axes.transAxes, ha="center", color="0.5")


def _first(lines: Sequence[tuple[str, str, str]], kind: str) -> int:
    """The number of a kind's first line, whose colours its embedding has."""
    return next(number for number, each in enumerate(lines) if each[0] == kind)


def _whole_ranks(axes: Any) -> None:
    """Ranks as whole numbers, with the best at the top."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(high, 10.0), min(low, 0.9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.minorticks_off()

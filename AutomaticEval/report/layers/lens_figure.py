"""Figures of the logit lens over a run's questions, and of a tuned lens beside the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from AutomaticEval.report.bars import ends_of
from AutomaticEval.report.labels import LINES, by_kind, by_stream, label, plain_log_ticks, save

Places = Sequence[Mapping[str, Any]]
FAR = 2.0
"""Embeddings so many times further from the output than any layer do not set the scale."""
TOGETHER = "bands: 95 % intervals, of all places together"


def lens_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with four panels by layer. result: of `logit_lens`, as JSON."""
    places, settings = result["places"], result["settings"]
    figure = Figure(figsize=(11.5, 7.5), layout="constrained")
    tuned = ", tuned" if settings.get("tuned") else ""
    n_after = result.get("n_after_space", 0)
    after = f", {n_after} of them read after the white space of their answer" if n_after else ""
    figure.suptitle(
        label(
            f"Logit lens{tuned} at {settings['position']}: {result['run']['model']} ({result['n_questions']} questions{after})"
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
    nats = [("entropy", "entropy"), ("kl", "divergence from the model's own")]
    _panel(spread, places, nats)
    spread.set(title="How sure, and how far from the output", ylabel="nats")
    _nats(spread, places, nats)
    figure.supxlabel(f"layer (-1: the embeddings); {TOGETHER}", fontsize="small")
    save(figure, path, 150)


def tuned_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the held-out divergence of the plain and the tuned lens by layer. result: of `train_tuned_lens`, as JSON."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    n = result["n_prompts"]
    nats = [("plain", "plain lens"), ("tuned", "tuned lens")]
    _panel(axes, result["places"], nats)
    axes.set(
        title=label(
            f"Tuned lens of {result['run']['model']}: {n['train']} prompts learned from, {n['held_out']} held out"
        ),
        xlabel=f"layer (-1: the embeddings); {TOGETHER}",
        ylabel="divergence from the model's own (nats)",
    )
    _nats(axes, result["places"], nats)
    save(figure, path, 150)


def _panel(
    axes: Any, places: Places, measures: Sequence[tuple[str, str]], scale: Callable[[Any], Any] = lambda value: value
) -> None:
    """A line with its band for each measure and kind of site. scale: is put on the numbers."""
    kinds = by_stream(places)
    lines = [(kind, *measure) for kind in kinds for measure in measures]
    for number, (kind, name, told) in enumerate(lines):
        known = [(layer, each[name]) for layer, each in kinds[kind] if each[name]["mean"] is not None]
        if not known:
            continue
        layers = [layer for layer, _ in known]
        means = np.array([scale(each["mean"]) for _, each in known])
        ends = np.array([scale(np.array(ends_of(each) or (each["mean"],) * 2)) for _, each in known])
        colour = LINES[number % len(LINES)]
        told = (told if len(kinds) == 1 else f"{kind}: {told}") + f" ({known[0][1]['n']} prompts)"
        axes.plot(layers, means, "-o", color=colour, markersize=3.5, label=told)
        if len(layers) > 1:
            axes.fill_between(layers, ends[:, 0], ends[:, 1], color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(layers, ends[:, 0], ends[:, 1], color=colour)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "no numbers", transform=axes.transAxes, ha="center", color="0.5")


def _nats(axes: Any, places: Places, measures: Sequence[tuple[str, str]]) -> None:
    """Begin at 0, and end above the layers: embeddings that are much further away are told in words."""
    once = by_kind(places).get("embed", [])
    others = [each[name] for each in places for name, _ in measures if not once or each is not once[0][1]]
    tops = [max([each["mean"], *(ends_of(each) or ())]) for each in others if each["mean"] is not None]
    high = max(tops, default=0.0)
    told = [
        f"{text} {mean:.1f}" for _, each in once for name, text in measures if (mean := each[name]["mean"]) is not None
    ]
    outside = any((each[name]["mean"] or 0.0) > FAR * high for _, each in once for name, _ in measures)
    if high > 0 and outside:
        axes.set_ylim(-0.03 * high, 1.1 * high)
        axes.set_title(f"{axes.get_title()}\nembeddings: {', '.join(told)}", fontsize="medium")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _whole_ranks(axes: Any) -> None:
    """Ranks as whole numbers, with the best at the top."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(high, 10.0), min(low, 0.9))
    plain_log_ticks(axes.yaxis)

"""The lens at each token and layer of one question: a heatmap with the likeliest token in each cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from AutomaticEval.report.labels import label, save
from AutomaticEval.safe_text import with_signs
from AutomaticEval.sites import kind_and_layer

MOST_SHOWN = 24
"""The last tokens are drawn; the file has all."""
MOST_LETTERS = 9


def question_figure(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG. result: of `lens_of_question`, as JSON."""
    places = result["places"]
    chances = np.array([each["probability"] for each in places])[:, -MOST_SHOWN:]
    tokens, following = result["tokens"][-MOST_SHOWN:], result["next_tokens"][-MOST_SHOWN:]
    n_places, n_tokens = chances.shape
    figure = Figure(figsize=(max(5.5, 0.78 * n_tokens + 2.6), 0.3 * n_places + 2.4), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(chances, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
    for place, each in enumerate(places):
        cells = zip(each["top_token"][-MOST_SHOWN:], each["rank"][-MOST_SHOWN:], strict=True)
        for at, (token, rank) in enumerate(cells):
            colour = "black" if chances[place, at] > 0.6 else "white"
            weight = "bold" if rank == 1 else "normal"
            axes.text(at, place, _short(token), ha="center", va="center", fontsize=7, color=colour, weight=weight)
    axes.set_yticks(range(n_places), [_name(each["site"]) for each in places], fontsize=7)
    axes.set_xticks(range(n_tokens), [_short(token) for token in tokens], fontsize=7, rotation=45, ha="right")
    above = axes.secondary_xaxis("top")
    above.set_xticks(range(n_tokens), [_short(token) for token in following], fontsize=7, rotation=45, ha="left")
    above.set_xlabel("token that came next", fontsize=8)
    axes.set_xlabel("token that was read", fontsize=8)
    asked = f"{result['task']} document {result['doc_id']}" if result["task"] else result["question"][-60:]
    n_hidden = len(result["tokens"]) - n_tokens + result["n_left_out"]
    note = f", the last {n_tokens} tokens" if n_hidden else ""
    tuned = "Tuned lens" if (result["settings"] or {}).get("tuned") else "Logit lens"
    told = label(f"{tuned}: {asked}, {result['run']['model']}{note}; cells: the likeliest token")
    axes.set_title("\n".join(wrap(told, max(40, 9 * n_tokens))), fontsize=9)
    figure.colorbar(
        shown, ax=axes, label="\n".join(wrap("probability of the token that came next (bold: it is the likeliest)", 34))
    )
    save(figure, path, 150)


def _short(token: str) -> str:
    text = with_signs(token)
    return label(text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…")


def _name(key: str) -> str:
    kind, layer = kind_and_layer(key)
    return label(str(layer) if kind == "resid_post" else key)

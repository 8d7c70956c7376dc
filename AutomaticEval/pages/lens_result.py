"""The one place that knows the files of the lens: `lens.json` and `lens_questions.parquet`, as a page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from AutomaticEval.analysis.lens.question_file import NAME, read_lens_questions
from AutomaticEval.pages.question_rows import rounded
from AutomaticEval.safe_text import shown
from AutomaticEval.sites import kind_and_layer

MOST_NUMBERS = 400_000
"""So many probabilities of choices are in a page; of more, those of the first questions."""
SHARES = {
    "choice_accuracy": "right choice is the likeliest",
    "gold_first": "right token is the likeliest",
    "gold_probability": "probability of the right token",
    "taken_probability": "probability of the answer's token",
}
"""Estimates between 0 and 1 that are drawn, where a result has them."""


def lens_lines(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for a chart over layers. Of a result that lacks something, what is there."""
    lines = []
    places = result.get("places")
    for place in places if isinstance(places, list) else []:
        kind, layer = kind_and_layer(str(place.get("site")))
        for name, told in SHARES.items():
            estimate = place.get(name)
            if isinstance(estimate, Mapping) and isinstance(estimate.get("mean"), int | float):
                low, high = estimate.get("interval") or (None, None)
                series = told if kind in ("resid_post", "embed") else f"{kind}: {told}"
                at = -1 if layer is None and kind == "embed" else layer or 0
                said = f"{place['site']}, {told}: {estimate['mean']:.3f}" + (
                    "" if low is None else f" [{low:.3f}, {high:.3f}]"
                )
                lines.append(
                    {"series": series, "layer": at, "mean": estimate["mean"], "low": low, "high": high, "said": said}
                )
    return lines


def lens_places(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for each place: its name, the median rank and the means that are there."""
    rows = []
    places = result.get("places")
    for place in places if isinstance(places, list) else []:
        median = place.get("median_rank")
        numbers = [_mean(place.get(name)) for name in (*SHARES, "entropy", "kl")]
        rows.append((str(place.get("site")), "" if median is None else f"{median:g}", *numbers))
    return rows


def _mean(estimate: Any) -> str:
    mean = estimate.get("mean") if isinstance(estimate, Mapping) else None
    return "" if mean is None else f"{mean:.3f}"


def choices_by_layer(file: Path, keys: Sequence[tuple[Any, Any, Any]]) -> dict[str, Any]:
    """places, and number of a question -> [n_places][n_choices] probabilities and the likeliest token of each place. Empty without the file."""
    path = file.parent / NAME
    if not path.exists():
        return {}
    wanted = ["task", "doc_id", "repeat", "place", "choice_probabilities", "top_token", "gold_rank"]
    table = read_lens_questions(path)[wanted]
    number_of = {(task, doc, repeat or 0): number for number, (task, doc, repeat) in enumerate(keys)}
    places = list(dict.fromkeys(table["place"]))
    found: dict[int, dict[str, list[Any]]] = {}
    n_numbers = 0
    for task, doc, repeat, place, chances, token, rank in table.itertuples(index=False):
        number = number_of.get((task, doc, repeat or 0))
        if number is None or n_numbers > MOST_NUMBERS:
            continue
        of = found.setdefault(number, {"places": [], "choices": [], "top": [], "rank": []})
        of["places"].append(place)
        of["choices"].append(None if chances is None else [rounded(each) for each in chances])
        of["top"].append(None if token is None else shown(str(token)))
        of["rank"].append(rounded(rank))
        n_numbers += 3 + (0 if chances is None else len(chances))
    return {"places": places, "questions": found}

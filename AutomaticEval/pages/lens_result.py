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


class LensQuestions:
    """What the lens says of each question of a run: the file beside a result, read once."""

    def __init__(self, file: Path, keys: Sequence[tuple[Any, Any, Any]]) -> None:
        """file: the result. keys: `keys_of` the run's questions. Without the file beside it, no question is there."""
        path = file.parent / NAME
        self._lines: dict[int, list[int]] = {}
        if not path.exists():
            return
        self._table = read_lens_questions(path)
        number_of = {(task, doc, repeat or 0): number for number, (task, doc, repeat) in enumerate(keys)}
        asked = zip(*(self._table[name] for name in ("task", "doc_id", "repeat")), strict=True)
        for line, (task, doc, repeat) in enumerate(asked):
            number = number_of.get((task, doc, repeat or 0))
            if number is not None:
                self._lines.setdefault(number, []).append(line)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the questions that are there, in the order of the file."""
        return list(self._lines)

    def of(self, number: int) -> dict[str, list[Any]] | None:
        """places, and at each of them the probabilities of the choices, the likeliest token, and the rank of the right one. None without the question."""
        if number not in self._lines:
            return None
        lines = self._table.iloc[self._lines[number]]
        return {
            "places": list(lines["place"]),
            "choices": [
                None if chances is None else [rounded(each) for each in chances]
                for chances in lines["choice_probabilities"]
            ],
            "top": [None if token is None else shown(str(token)) for token in lines["top_token"]],
            "rank": [rounded(rank) for rank in lines["gold_rank"]],
        }


def choices_by_layer(file: Path, keys: Sequence[tuple[Any, Any, Any]]) -> dict[int, Any]:
    """Number of a question -> what `LensQuestions.of` gives, of the first ones, within MOST_NUMBERS. Empty without the file."""
    lens = LensQuestions(file, keys)
    found: dict[int, Any] = {}
    n_numbers = 0
    for number in lens.numbers:
        of = lens.of(number)
        assert of is not None
        n_numbers += sum(3 + len(chances or ()) for chances in of["choices"])
        if n_numbers > MOST_NUMBERS and found:
            break
        found[number] = of
    return found

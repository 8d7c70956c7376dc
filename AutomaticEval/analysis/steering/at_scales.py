"""A model with a direction added at several scales: the model at one scale, and what is measured of the texts that it writes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.steering.direction import Direction
from AutomaticEval.analysis.words.metrics import TextMetric
from AutomaticEval.errors import EditError, SelectionError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.editing import editing
from AutomaticEval.selection import Positions


def parse_scales(text: str) -> list[float]:
    """The scales in "-4,0,4", in ascending order. Raises SelectionError for what is no number, for infinity and NaN, and for a scale that is named twice."""
    scales: list[float] = []
    for item in text.split(","):
        try:
            scale = float(item) + 0.0  # of -0, too
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise SelectionError(
                f"--scale {text!r}: {item.strip()!r} is no number; write numbers with commas, such as -4,0,4."
            )
        if scale in scales:
            raise SelectionError(f"--scale {text!r} names {scale:g} twice; leave one of them out.")
        scales.append(scale)
    return sorted(scales)


@dataclass(frozen=True)
class Steering:
    """A model, and the directions that are added together, each at its own site.

    Raises SiteUnavailable for a site that the model lacks, and EditError for a vector of another width. Warns of a direction of another model.
    """

    loaded: LoadedModel
    directions: Sequence[Direction]
    positions: Positions

    def __post_init__(self) -> None:
        layout = self.loaded.layout
        layout.pick(each.at for each in self.directions)
        for each in self.directions:
            if len(each.vector) != layout.widths[each.at]:
                raise EditError(
                    f"the direction at {each.at.key} has {len(each.vector)} numbers, and {each.at.key} of {self.loaded.name} has {layout.widths[each.at]}: "
                    "it is a direction of another model or site."
                )
        self._warn_of_another_model()

    @contextmanager
    def at(self, scale: float, *_: Sequence[int]) -> Iterator[None]:
        """The model with scale times each direction; at scale 0 the plain model, without an edit."""
        edits = [each.edit(scale, self.positions) for each in self.directions]
        if scale == 0:
            yield
            return
        with editing(self.loaded.model, edits):
            yield

    def _warn_of_another_model(self) -> None:
        models = [model for each in self.directions for model in each.made_from.get("models", ())]
        hashes = {model.get("hash") for model in models} - {None}
        names = list(dict.fromkeys(str(model.get("name")) for model in models))
        own = self.loaded.fingerprint() if hashes else None
        if (hashes and own not in hashes) or (not hashes and names and self.loaded.name not in names):
            same = (
                f" of other weights (hash {own[:8]}, made with {', '.join(sorted(h[:8] for h in hashes))})"
                if own
                else ""
            )
            warnings.warn(
                f"the direction was made with {' and '.join(names)}, and is added to {self.loaded.name}{same}.",
                UserWarning,
                stacklevel=3,
            )


def of_texts(texts: Sequence[str], metrics: Sequence[TextMetric]) -> Mapping[str, Any]:
    """Metric -> the Estimate of its mean over the texts; a text for which it is not defined does not count."""
    return {
        metric.name: mean_interval([each for each in metric.of(texts) if math.isfinite(each)]) for metric in metrics
    }

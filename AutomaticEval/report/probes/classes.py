"""The classes of a probe's result and the choice of its place in words, for titles, axes and pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = 8


def classes_told(classes: Mapping[str, Any]) -> str:
    """`31 true, 29 false`; of several classes `4 classes: 0 (25), 1 (24), …`. classes: of a result of `probe`."""
    counts = classes.get("counts")
    if counts is None:
        return f"{classes['n_positive']} {classes['positive']}, {classes['n_negative']} {classes['negative']}"
    shown = ", ".join(f"{name} ({n})" for name, n in [*counts.items()][:SHOWN])
    return f"{len(counts)} classes: {shown}{' …' if len(counts) > SHOWN else ''}"


def title_told(classes: Mapping[str, Any]) -> str:
    """`31 true, 29 false`; of several classes, whose names may be long, `4 classes, 100 questions`."""
    counts = classes.get("counts")
    return classes_told(classes) if counts is None else f"{len(counts)} classes, {sum(counts.values())} questions"


def measure_told(classes: Mapping[str, Any]) -> str:
    """`AUROC`; of several classes `Mean AUROC of 4 classes`."""
    counts = classes.get("counts")
    return "AUROC" if counts is None else f"Mean AUROC of {len(counts)} classes"


def chosen_told(places: Mapping[str, int]) -> str:
    """`chosen in 3 of 5 folds`, of the first place. places: place -> folds that chose it, as a result has them."""
    return f"chosen in {next(iter(places.values()))} of {sum(places.values())} folds"

"""Classes as sides: each of several classes against the rest, and of two classes the second against the first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
MOST_CLASSES = 20
"""Of more classes, one has to be named."""


def sides_of(labels: Array, n_classes: int | None = None) -> Array:
    """[n_sides, ..., n_questions], 0 or 1: which questions are of a class. A side for each class; of two classes one, that of class 1.

    labels: [..., n_questions], the numbers of their classes. n_classes: by default as the largest label says.
    """
    n = int(labels.max()) + 1 if n_classes is None else n_classes
    if n <= 2:
        return labels[None]
    classes = np.arange(n).reshape(n, *[1] * labels.ndim)
    sides: Array = (labels == classes).astype(labels.dtype)
    return sides


def of_sides(values: Array, n_sides: int) -> Array:
    """[n_sides, n_repeats, n_questions], of values that have no first dimension for one side."""
    return values.reshape(n_sides, *values.shape[-2:])


class Outcomes(NamedTuple):
    """What probabilities come to: [n_repeats, n_questions] each."""

    right: Array
    """Whether the likeliest class is the right one."""

    squares: Array
    """The square of probability - label; of several classes the sum over them."""

    said: Array
    """The probability of class 1; of several classes that of the likeliest one."""

    true: Array
    """Whether the question is of that class."""


def outcomes(probabilities: Array, labels: Array) -> Outcomes:
    """probabilities: [n_repeats, n_questions] of class 1, or [n_classes, n_repeats, n_questions]. labels: [n_questions], the numbers of their classes."""
    if probabilities.ndim == 2:
        right = (probabilities > 0.5) == labels.astype(bool)
        true = np.broadcast_to(labels, probabilities.shape)
        return Outcomes(right, (probabilities - labels) ** 2, probabilities, true)
    right = probabilities.argmax(0) == labels
    squares = ((probabilities - sides_of(labels, len(probabilities))[:, None]) ** 2).sum(0)
    return Outcomes(right, squares, probabilities.max(0), right.astype(int))

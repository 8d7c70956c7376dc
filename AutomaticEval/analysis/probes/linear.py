"""Linear probes: logistic regression whose strength is chosen inside the training part, and the difference of means."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from AutomaticEval.analysis.probes.folds import Fold
from AutomaticEval.analysis.probes.measures import auroc

Array = np.ndarray[Any, Any]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's C: the smaller, the stronger the regularisation. Tried from the strongest on, until two in a row are no better."""
MOST_STEPS = 200


@dataclass(frozen=True)
class Linear:
    """A probe: the log-odds of the label are (row - shift) / scale @ weights + bias."""

    shift: Array
    scale: Array
    weights: Array
    bias: float
    strength: float | None = None

    def log_odds(self, rows: Array) -> Array:
        """[n] for rows [n, width]."""
        odds: Array = ((rows - self.shift) / self.scale) @ self.weights + self.bias
        return odds

    @property
    def direction(self) -> Array:
        """[width], in the units of the rows: a row that moves along it becomes more likely to have the label."""
        direction: Array = self.weights / self.scale
        return direction


def standardised(rows: Array) -> tuple[Array, Array]:
    """The mean and the standard deviation of each column; a column that is one number keeps its scale."""
    scale = rows.std(0)
    return rows.mean(0), np.where(scale > 0, scale, 1).astype(rows.dtype)


def chosen_probe(rows: Array, labels: Array, fold: Fold) -> tuple[Linear, float]:
    """A logistic probe that learned from the fold's training part, and its AUROC where the strength was chosen.

    rows: [n_questions, width], float32. labels: [n_questions], 0 or 1.
    """
    best, found, worse = STRENGTHS[0], -1.0, 0
    shift, scale = standardised(rows[fold.fit])
    fit, choose = ((rows[part] - shift) / scale for part in (fold.fit, fold.choose))
    model = _model(STRENGTHS[0])
    for strength in STRENGTHS:
        model.set_params(C=strength)
        _learn(model, fit, labels[fold.fit])
        scores = choose @ model.coef_[0]
        value = float(auroc(scores, labels[fold.choose], np.ones((1, len(scores))))[0])
        worse = 0 if value > found else worse + 1
        if value > found:
            best, found = strength, value
        if worse == 2:
            break
    return logistic(rows[fold.train], labels[fold.train], best), found


def logistic(rows: Array, labels: Array, strength: float) -> Linear:
    """scikit-learn's logistic regression of standardised rows."""
    shift, scale = standardised(rows)
    model = _learn(_model(strength), (rows - shift) / scale, labels)
    return Linear(shift, scale, model.coef_[0], float(model.intercept_[0]), strength)


def _model(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=MOST_STEPS, tol=1e-3, warm_start=True)


def _learn(model: LogisticRegression, rows: Array, labels: Array) -> LogisticRegression:
    with warnings.catch_warnings():  # a probe that stops early is a probe that is regularised more
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(rows, labels)


def difference_of_means(rows: Array, labels: Array) -> Linear:
    """The mean row with the label minus the mean row without it, scaled so that its log-odds fit (a logistic regression of that one number)."""
    shift, scale = standardised(rows)
    centred = (rows - shift) / scale
    direction = centred[labels == 1].mean(0) - centred[labels == 0].mean(0)
    one = logistic((centred @ direction)[:, None], labels, 1.0)
    weight = float(one.weights[0] / one.scale[0])
    return Linear(shift, scale, direction * weight, one.bias - float(one.shift[0]) * weight)

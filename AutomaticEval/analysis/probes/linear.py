"""Linear probes: logistic regression whose strength is chosen inside the training part, and the difference of means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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

    shift: Any
    scale: Any
    """[width] each; 0 and 1 for sparse rows, which are not standardised."""

    weights: Array
    bias: float
    strength: float | None = None

    def log_odds(self, rows: Any) -> Array:
        """[n] for rows [n, width]."""
        odds: Array = _scaled(rows, self.shift, self.scale) @ self.weights + self.bias
        return odds

    @property
    def direction(self) -> Array:
        """[width], in the units of the rows: a row that moves along it becomes more likely to have the label."""
        direction: Array = self.weights / self.scale
        return direction


def standardised(rows: Any) -> tuple[Any, Any]:
    """The mean and the standard deviation of each column; a column that is one number keeps its scale. 0 and 1 for sparse rows."""
    if not isinstance(rows, np.ndarray):
        return 0, 1
    scale = rows.std(0)
    return rows.mean(0), np.where(scale > 0, scale, 1).astype(rows.dtype)


def _scaled(rows: Any, shift: Any, scale: Any) -> Any:
    return (rows - shift) / scale if isinstance(rows, np.ndarray) else rows


def chosen_probe(rows: Any, labels: Array, fold: Fold, strengths: Sequence[float] = STRENGTHS) -> tuple[Linear, float]:
    """A logistic probe that learned from the fold's training part, and its AUROC where the strength was chosen (0 where that has one label only).

    rows: [n_questions, width], float32 or sparse. labels: [n_questions], 0 or 1. The strength is the one with the smallest log loss: one that is
    chosen by AUROC may rank well and give all questions about the same probability.
    """
    best, found, least, worse = strengths[0], 0.0, np.inf, 0
    shift, scale = standardised(rows[fold.fit])
    fit, choose = (_scaled(rows[part], shift, scale) for part in (fold.fit, fold.choose))
    sides = 1 - 2 * labels[fold.choose]
    model = _model(strengths[0])
    for strength in strengths:
        model.set_params(C=strength).fit(fit, labels[fold.fit])
        scores = choose @ model.coef_[0] + model.intercept_[0]
        loss = float(np.logaddexp(0, sides * scores).mean())
        worse = 0 if loss < least else worse + 1
        if loss < least:
            best, least, found = strength, loss, auroc(scores, labels[fold.choose])
        if worse == 2:
            break
    return logistic(rows[fold.train], labels[fold.train], best), 0.0 if np.isnan(found) else found


def logistic(rows: Any, labels: Array, strength: float) -> Linear:
    """scikit-learn's logistic regression of standardised rows."""
    shift, scale = standardised(rows)
    model = _model(strength).fit(_scaled(rows, shift, scale), labels)
    return Linear(shift, scale, model.coef_[0], float(model.intercept_[0]), strength)


def _model(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=MOST_STEPS, tol=1e-3, warm_start=True)


def difference_of_means(rows: Array, labels: Array) -> Linear:
    """The mean row with the label minus the mean row without it, scaled so that its log-odds fit (a logistic regression of that one number)."""
    shift, scale = standardised(rows)
    centred = (rows - shift) / scale
    direction = centred[labels == 1].mean(0) - centred[labels == 0].mean(0)
    one = logistic((centred @ direction)[:, None], labels, 1.0)
    weight = float(one.weights[0] / one.scale[0])
    return Linear(shift, scale, direction * weight, one.bias - float(one.shift[0]) * weight)

"""The numbers of probes: against scikit-learn's, and against resamples that are made one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, brier_score_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from AutomaticEval.analysis.probes.folds import folds
from AutomaticEval.analysis.probes.linear import chosen_probe, difference_of_means, logistic
from AutomaticEval.analysis.probes.measures import MEASURES, accuracy, auroc, brier, calibration_error, rejection_ratio
from AutomaticEval.analysis.probes.out_of_fold import PERCENTILES, OutOfFold, best_of, measured, out_of_fold, resamples
from AutomaticEval.errors import StoreError


@pytest.fixture
def judged() -> tuple[Any, Any, Any]:
    """Probabilities with ties, labels, and resamples as weights."""
    source = np.random.default_rng(1)
    labels = source.random(60) < 0.4
    probabilities = np.round(np.clip(0.4 + 0.3 * labels + source.normal(0, 0.3, 60), 0, 1), 1)
    draws = source.integers(0, 60, (25, 60))
    return probabilities, labels, np.stack([np.bincount(draw, minlength=60) for draw in draws])


@pytest.mark.parametrize(
    ("measure", "of_sklearn"),
    [(auroc, roc_auc_score), (accuracy, lambda y, p: accuracy_score(y, p > 0.5)), (brier, brier_score_loss)],
)
def test_measures_of_resamples_are_those_of_scikit_learn(measure: Any, of_sklearn: Any, judged: Any) -> None:
    probabilities, labels, weights = judged
    expected = [of_sklearn(*(np.repeat(each, counts) for each in (labels, probabilities))) for counts in weights]
    np.testing.assert_allclose(measure(probabilities, labels, weights), expected, atol=1e-12)


def test_calibration_and_rejection_are_what_their_definitions_give(judged: Any) -> None:
    probabilities, labels, weights = judged
    for counts, error, ratio in zip(
        weights,
        calibration_error(probabilities, labels, weights),
        rejection_ratio(probabilities, labels, weights),
        strict=True,
    ):
        said, true = np.repeat(probabilities, counts), np.repeat(labels, counts)
        gap = 0.0
        for low in np.arange(10) / 10:
            inside = (said >= low - 1e-9) & ((said < low + 0.1 - 1e-9) | (low == 0.9))
            gap += abs(said[inside].sum() - true[inside].sum()) / len(said)
        assert error == pytest.approx(gap)

        def area(scores: Any, true: Any = true) -> float:
            """Over every number of kept questions; those with equal scores are worth the share of all that are kept with them."""
            return float(np.mean([true[scores >= score].mean() for score in scores]))

        assert ratio == pytest.approx((area(said) - true.mean()) / (area(true) - true.mean()))


def test_measures_without_both_labels_are_not_a_number(judged: Any) -> None:
    probabilities, _, weights = judged
    for name in ("auroc", "prr"):
        assert np.isnan(MEASURES[name](probabilities, np.ones(60), weights)).all()


def planted(n: int = 600, width: int = 40, seed: int = 0) -> tuple[Any, Any, Any]:
    source = np.random.default_rng(seed)
    rows = source.normal(size=(n, width)).astype(np.float32) * np.linspace(0.1, 30, width, dtype=np.float32)
    labels = (rows[:, 3] / rows[:, 3].std() + source.normal(size=n) > 0).astype(int)
    return rows, labels, source.integers(0, n // 3, n)


def test_parts_of_a_fold_share_no_group_and_every_question_is_tested_once_a_repeat() -> None:
    _, labels, groups = planted()
    repeats = list(folds(labels, groups, 5, 2, 7))
    for whole in repeats:
        np.testing.assert_array_equal(np.sort(np.concatenate([fold.test for fold in whole])), np.arange(600))
        for fold in whole:
            parts = [set(groups[part]) for part in fold]
            assert sum(map(len, parts)) == len(set().union(*parts))
            assert sorted([*fold.fit, *fold.choose]) == fold.train.tolist()
            assert abs(labels[fold.test].mean() - labels.mean()) < 0.1
    assert not np.array_equal(repeats[0][0].test, repeats[1][0].test)
    again = list(folds(labels, groups, 5, 1, 7))
    np.testing.assert_array_equal(again[0][0].test, repeats[0][0].test)
    with pytest.raises(StoreError, match="2 different questions have the label 1; 5 folds need"):
        list(folds(np.array([0] * 20 + [1] * 4), np.array([*range(20), 20, 20, 21, 21]), 5, 1, 0))


def test_a_probe_is_scikit_learns_on_the_same_part() -> None:
    rows, labels, groups = planted()
    ((fold, *_),) = folds(labels, groups, 5, 1, 0)
    probe, _ = chosen_probe(rows, labels, fold)
    scaler = StandardScaler().fit(rows[fold.train])
    plain = LogisticRegression(C=probe.strength, max_iter=1000, tol=1e-6).fit(
        scaler.transform(rows[fold.train]), labels[fold.train]
    )
    np.testing.assert_allclose(
        probe.log_odds(rows[fold.test]), plain.decision_function(scaler.transform(rows[fold.test])), atol=0.02
    )
    expected = roc_auc_score(labels[fold.test], plain.decision_function(scaler.transform(rows[fold.test])))
    assert roc_auc_score(labels[fold.test], probe.log_odds(rows[fold.test])) == pytest.approx(expected, abs=0.002)
    moved = rows[fold.test] + probe.direction / np.linalg.norm(probe.direction)
    assert (probe.log_odds(moved) > probe.log_odds(rows[fold.test])).all()


def test_strength_is_chosen_without_the_tested_questions() -> None:
    rows, labels, groups = planted()
    ((fold, *_),) = folds(labels, groups, 5, 1, 0)
    other = rows.copy()
    other[fold.test] = 1e6
    found = [chosen_probe(each, labels, fold) for each in (rows, other)]
    assert found[0][1] == found[1][1]
    np.testing.assert_array_equal(found[0][0].weights, found[1][0].weights)


def test_the_difference_of_means_is_that_difference() -> None:
    rows, labels, _ = planted()
    probe = difference_of_means(rows, labels)
    scaled = StandardScaler().fit_transform(rows)
    difference = scaled[labels == 1].mean(0) - scaled[labels == 0].mean(0)
    assert np.corrcoef(probe.weights, difference)[0, 1] == pytest.approx(1, abs=1e-4)
    probabilities = 1 / (1 + np.exp(-probe.log_odds(rows)))
    assert probabilities.mean() == pytest.approx(labels.mean(), abs=0.01)
    assert logistic(rows, labels, 1e-2).log_odds(rows).shape == (600,)


def of_one(rows: Any, labels: Any, groups: Any, n_folds: int = 5) -> tuple[OutOfFold, Any]:
    repeats = list(folds(labels, groups, n_folds, 1, 0))
    return out_of_fold(lambda _: rows, labels, repeats), repeats


def test_shuffled_labels_are_at_chance_and_a_planted_direction_is_found() -> None:
    rows, labels, groups = planted(n=400)
    weights = resamples(groups, 0, 300)
    found, repeats = of_one(rows, labels, groups)
    value = measured(found, labels, repeats, weights)["auroc"]
    low, high = np.nanpercentile(value[1:], PERCENTILES)
    assert low < 0.78 < high  # of the planted column itself: two normals, one of which the label adds
    shuffled = np.random.default_rng(0).permutation(labels)
    found, repeats = of_one(rows, shuffled, groups)
    low, high = np.nanpercentile(measured(found, shuffled, repeats, weights)["auroc"][1:], PERCENTILES)
    assert low < 0.5 < high


def test_no_question_chooses_the_place_that_it_is_judged_at() -> None:
    """Among 40 places of noise the best one on all questions looks far better than chance."""
    source = np.random.default_rng(3)
    labels, groups = source.integers(0, 2, 120), np.arange(120)
    repeats = list(folds(labels, groups, 5, 1, 0))
    places = [
        out_of_fold(lambda _, rows=source.normal(size=(120, 5)).astype(np.float32): rows, labels, repeats)
        for _ in range(40)
    ]  # type: ignore[misc]
    weights = resamples(groups, 0, 300)
    most = max(measured(each, labels, repeats, weights)["auroc"][0] for each in places)
    best, numbers = best_of(places, repeats)
    value = measured(best, labels, repeats, weights)["auroc"]
    low, high = np.nanpercentile(value[1:], PERCENTILES)
    assert most > 0.62
    assert low < 0.5 < high
    assert numbers.shape == (1, 5)


def test_groups_are_drawn_whole() -> None:
    groups = np.array([4, 4, 9, 9, 9, 1])
    weights = resamples(groups, 1, 50)
    assert (weights[0] == 1).all()
    for group in (4, 9, 1):
        assert (weights[:, groups == group] == weights[:, groups == group][:, :1]).all()
    assert set((weights[1:, 0] + weights[1:, 2] + weights[1:, 5]).tolist()) == {3}

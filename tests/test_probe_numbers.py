"""The numbers of probes: against scikit-learn's on the same folds, against definitions, and by simulation."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, brier_score_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from AutomaticEval.analysis.probes.folds import Fold, folds
from AutomaticEval.analysis.probes.intervals import auroc_within_folds, estimate, mean_over_questions
from AutomaticEval.analysis.probes.judged import Judge
from AutomaticEval.analysis.probes.leaks.duplicates import near_duplicates
from AutomaticEval.analysis.probes.linear import chosen_probe
from AutomaticEval.analysis.probes.measures import auroc, calibration_error, rejection_ratio
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold, best_of, out_of_fold
from AutomaticEval.analysis.probes.places import along_means, p_values, shuffled_labels
from AutomaticEval.errors import StoreError


@pytest.fixture
def judged() -> tuple[Any, Any]:
    """Probabilities with ties, and labels."""
    source = np.random.default_rng(1)
    labels = (source.random(60) < 0.4).astype(int)
    return np.round(np.clip(0.4 + 0.3 * labels + source.normal(0, 0.3, 60), 0, 1), 1), labels


def test_calibration_and_rejection_are_what_their_definitions_give(judged: Any) -> None:
    said, true = judged
    assert auroc(said, true) == pytest.approx(roc_auc_score(true, said))
    gap = 0.0
    for low in np.arange(10) / 10:
        inside = (said >= low - 1e-9) & ((said < low + 0.1 - 1e-9) | (low == 0.9))
        gap += abs(said[inside].sum() - true[inside].sum()) / len(said)
    assert calibration_error(said, true) == pytest.approx(gap)
    few, label = np.array([0.9, 0.5, 0.5, 0.5, 0.1]), np.array([1, 0, 1, 1, 0])

    def area(order: Any) -> float:
        return float(np.mean([label[list(order[: k + 1])].mean() for k in range(5)]))

    orders = [(0, *middle, 4) for middle in permutations((1, 2, 3))]
    best, base = area((0, 2, 3, 1, 4)), label.mean()
    assert rejection_ratio(few, label) == pytest.approx((np.mean([*map(area, orders)]) - base) / (best - base))
    assert rejection_ratio(true, true) == pytest.approx(1)
    assert rejection_ratio(np.ones(60), true) == pytest.approx(0)


def test_measures_without_both_labels_are_not_a_number(judged: Any) -> None:
    assert np.isnan([auroc(judged[0], np.ones(60)), rejection_ratio(judged[0], np.ones(60))]).all()


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
    # ours stops at a gradient of 1e-3, in float32
    expected = plain.decision_function(scaler.transform(rows[fold.test]))
    np.testing.assert_allclose(probe.log_odds(rows[fold.test]), expected, atol=0.02)
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


def of_one(rows: Any, labels: Any, groups: Any, n_folds: int = 5) -> tuple[OutOfFold, Judge]:
    repeats = list(folds(labels, groups, n_folds, 2, 0))
    return out_of_fold(lambda _: rows, labels, repeats), Judge(labels, groups, repeats)


def test_numbers_are_scikit_learns_on_the_same_folds() -> None:
    rows, labels, groups = planted(n=300)
    found, judge = of_one(rows, labels, groups)
    said = judge(found)
    parts = [(odds, fold.test) for odds, whole in zip(found.log_odds, judge.repeats, strict=True) for fold in whole]
    assert said.auroc.mean == pytest.approx(np.mean([roc_auc_score(labels[part], odds[part]) for odds, part in parts]))
    whole = found.probabilities
    assert said.accuracy.mean == pytest.approx(np.mean([accuracy_score(labels, each > 0.5) for each in whole]))
    assert said.brier.mean == pytest.approx(np.mean([brier_score_loss(labels, each) for each in whole]))
    for each in (said.auroc, said.accuracy, said.brier):
        assert each.interval[0] < each.mean < each.interval[1]


def test_the_difference_of_means_is_that_difference_and_shuffles_are_made_as_one_by_one() -> None:
    rows, labels, groups = planted(n=300)
    repeats = list(folds(labels, groups, 5, 1, 0))
    shuffles = shuffled_labels(labels, groups, 0, 3)
    along, aurocs = along_means(rows, labels, repeats, shuffles)
    for said, true in ((along[0], labels), (None, shuffles[1])):
        by_hand = np.empty(300)
        for fold in repeats[0]:
            scaler = StandardScaler().fit(rows[fold.train])
            learned = scaler.transform(rows[fold.train])
            direction = learned[true[fold.train] == 1].mean(0) - learned[true[fold.train] == 0].mean(0)
            by_hand[fold.test] = scaler.transform(rows[fold.test]) @ direction
        if said is not None:
            np.testing.assert_allclose(said, by_hand, rtol=1e-3, atol=1e-3)
        else:
            expected = np.mean([roc_auc_score(true[fold.test], by_hand[fold.test]) for fold in repeats[0]])
            assert aurocs[1] == pytest.approx(expected, abs=2e-3)  # float32: a pair may change places


def test_shuffles_move_the_labels_of_whole_groups() -> None:
    groups = np.array([3, 3, 1, 1, 0, 2, 7, 7])
    labels = np.array([1, 1, 0, 1, 0, 1, 0, 0])
    shuffles = shuffled_labels(labels, groups, 0, 200)
    for each in shuffles:
        assert sorted(tuple(each[groups == group]) for group in (1, 3, 7)) == [(0, 0), (0, 1), (1, 1)]
        assert sorted(each[4:6]) == [0, 1]
    assert len({tuple(each) for each in shuffles}) == 12
    assert p_values([0.9, 0.55], [np.array([0.5, 0.6, 0.4]), np.array([0.7, 0.3, 0.5])]) == [0.25, 0.75]


def balanced_folds(labels: Any, groups: Any, draw: Any, k: int = 5) -> list[list[Fold]]:
    """Folds that are quick to make: groups in the order of their labels, dealt out."""
    share = np.bincount(groups, labels) / np.bincount(groups)
    number = np.empty(len(share), int)
    number[np.lexsort([draw.random(len(share)), share])] = np.arange(len(share)) % k
    of, every = number[groups], np.arange(len(labels))
    parts = [every[of == each] for each in range(k)]
    rest = [np.setdiff1d(every, np.union1d(parts[each], parts[(each + 1) % k])) for each in range(k)]
    return [[Fold(rest[each], parts[(each + 1) % k], parts[each]) for each in range(k)]]


@pytest.mark.parametrize(
    ("n", "width", "signal", "in_group"),
    [(60, 40, 0.5, 1), (100, 20, 0.0, 2), (200, 1, 2.5, 1)],
)
def test_intervals_hold_the_truth_in_90_to_100_of_100_simulated_runs(
    n: int, width: int, signal: float, in_group: int
) -> None:
    """The truth is the mean over the runs. The questions that are judged are learned from in other folds, which fixed probes do not see."""
    draw = np.random.default_rng(5)
    shares, groups = [], np.repeat(np.arange(n // in_group), in_group)
    for _ in range(150):
        rows = draw.normal(size=(n // in_group, width))[groups].astype(np.float32)
        labels = (signal * rows[:, 0] + draw.normal(size=n // in_group)[groups] > 0).astype(int)
        along, _ = along_means(rows, labels, repeats := balanced_folds(labels, groups, draw), labels[None])
        right = mean_over_questions(((along > 0) == labels).astype(float))
        shares.append((auroc_within_folds(along, labels, repeats), right, labels))
    for which in range(2):
        truth = np.mean([each[which].value for each in shares])
        ends = [estimate(each[which], groups, each[2]).interval for each in shares]
        covered = np.mean([low <= truth <= high for low, high in ends])
        assert covered >= 0.90 - 2 * (0.9 * 0.1 / 150) ** 0.5, (which, covered)
        width_of_all = np.mean([high - low for low, high in ends])
        spread = np.std([each[which].value for each in shares])
        assert width_of_all < 2 * 3.2 * spread  # and it is not merely wide: 1.96 would be a perfect one


def test_a_perfect_probe_is_not_sure() -> None:
    labels = np.repeat([0, 1], 30)
    repeats = balanced_folds(labels, np.arange(60), np.random.default_rng(0))
    share = auroc_within_folds(labels[None].astype(float), labels, repeats)
    found = estimate(share, np.arange(60), labels, 10)
    assert found.mean == pytest.approx(1)
    assert found.interval == (pytest.approx(0.025 ** (1 / 30)), 1)
    assert found.simultaneous[0] < found.interval[0]
    few = estimate(share, np.repeat(np.arange(4), 15), labels)
    assert (few.interval, few.reason) == (None, "4 separate groups or tasks: an interval needs 5 at least.")


def test_an_interval_contains_its_number_also_without_any_spread() -> None:
    """Scores that are all equal, such as those of the more frequent class, have an AUROC of 0.5 but for rounding."""
    for n in range(40, 400, 7):
        labels = np.arange(n) % 3 % 2
        repeats = balanced_folds(labels, np.arange(n), np.random.default_rng(n))
        found = estimate(auroc_within_folds(np.zeros((1, n)), labels, repeats), np.arange(n), labels)
        assert found.mean == pytest.approx(0.5)
        low, high = found.interval
        assert low <= found.mean <= high
        assert high - low < 1e-9


def test_paired_numbers_differ_by_less_than_each_alone() -> None:
    rows, labels, groups = planted(n=300)
    found, judge = of_one(rows, labels, groups)
    near = found.log_odds.copy()
    near[:, :5] *= -1
    one, other = judge.auroc(found.log_odds), judge.auroc(near)
    paired, alone = judge.estimate(one - other), judge.estimate(one)
    assert paired.mean == pytest.approx(one.value - other.value)
    assert paired.interval[1] - paired.interval[0] < (alone.interval[1] - alone.interval[0]) / 3


def test_no_question_chooses_the_place_that_it_is_judged_at() -> None:
    """Among 12 places of noise the best one on all questions looks better than chance."""
    source = np.random.default_rng(3)
    labels, groups = source.integers(0, 2, 120), np.arange(120)
    repeats = list(folds(labels, groups, 5, 1, 0))
    noise = source.normal(size=(12, 120, 5)).astype(np.float32)
    places = [out_of_fold(lambda _, rows=rows: rows, labels, repeats) for rows in noise]  # type: ignore[misc]
    judge = Judge(labels, groups, repeats)
    most = max((judge(each) for each in places), key=lambda each: each.auroc.mean or 0)
    best, numbers = best_of(places, repeats)
    low, high = judge(best).auroc.interval or (1, 0)
    assert low < 0.5 < high
    assert most.auroc.mean > judge(best).auroc.mean + 0.03
    assert numbers.shape == (1, 5)


def test_near_duplicates_are_those_that_share_their_own_words() -> None:
    draw = np.random.default_rng(0)
    words = [f"w{number}" for number in range(400)]
    texts = [" ".join(["The", "same", "examples", *draw.choice(words, 40), "Answer:"]) for _ in range(200)]
    changed = texts[3].split()
    changed[20] = "other"
    texts += [" ".join(changed), texts[7], texts[9]]
    tasks = ["t"] * 203
    groups = np.array([*range(200), 200, 201, 9])  # the last is an equal prompt: one group
    assert near_duplicates(texts, tasks, groups) == [(3, 200), (7, 201)]
    short = [f"Question: What is {word}?\nAnswer:" for word in words]
    assert near_duplicates(short, ["t"] * 400, np.arange(400)) == []
    assert near_duplicates([""] * 3, ["t"] * 3, np.arange(3)) == []

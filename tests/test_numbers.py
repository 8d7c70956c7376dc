"""Intervals, p values and parts: how often they hold, by simulation with fixed seeds, and the same numbers by scipy and by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from AutomaticEval.analysis.numbers import paired, permutation, ratios, skewed_t
from AutomaticEval.analysis.numbers.estimate import effects, mean_interval, mean_intervals
from AutomaticEval.analysis.numbers.paired import corrected, mcnemar, paired_change
from AutomaticEval.analysis.numbers.ranks import ByGroup, rank_correlation, spearman
from AutomaticEval.analysis.numbers.ratios import part_of, parts_of, too_small
from AutomaticEval.analysis.numbers.signs import least_p, p_values
from AutomaticEval.analysis.numbers.text_groups import N_GROUPS, TextGroups
from AutomaticEval.analysis.result import Estimate
from AutomaticEval.analysis.words.placebos import p_beside_placebos

Array = np.ndarray
SIX_PAIRS = [0.60, 1.47, 0.48, 1.38, 1.03, 0.009]
"""clean - corrupted of each."""


def drawn(kind: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Array, float]:
    """Values, and their true mean."""
    source = np.random.default_rng(seed)
    if kind == "normal":
        return source.normal(3.0, 1.0, shape), 3.0
    if kind == "exponential":
        return source.exponential(1.0, shape), 1.0
    if kind == "negative lognormal":
        return -source.lognormal(0.0, 1.0, shape), -float(np.exp(0.5))
    assert kind == "lognormal"
    return source.lognormal(0.0, 1.0, shape), float(np.exp(0.5))


@pytest.mark.parametrize("n", [5, 16, 70])
@pytest.mark.parametrize("kind", ["normal", "lognormal", "negative lognormal", "exponential"])
def test_an_interval_holds_its_mean_as_often_as_it_says(kind: str, n: int) -> None:
    """20,000 data sets, one a column: a percentile bootstrap holds 72 to 94 % of the same."""
    values, true = drawn(kind, (n, 20_000), seed=n)
    low, high = skewed_t.interval(skewed_t.spread(values))
    held = 100 * ((low <= true) & (true <= high)).mean()
    assert 91 <= held <= 98, held


@pytest.mark.parametrize("n", [5, 16, 70])
def test_a_parts_interval_holds_as_often_as_it_says(n: int) -> None:
    """Of 400 sets of pairs whose parts and differences vary."""
    source = np.random.default_rng(n)
    held = 0
    for _ in range(400):
        wholes = source.lognormal(0.0, 0.5, n)
        low, high = part_of(wholes * source.beta(1, 3, n), wholes).interval
        held += low <= 0.25 <= high
    assert 91 <= held / 4 <= 98, held


def test_without_skewness_it_is_students_t() -> None:
    values = np.array([1.0, 2, 3, 4, 5, 6, 7])
    expected = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert mean_interval(values.tolist()).interval == pytest.approx(expected)


def test_its_spread_is_scipys() -> None:
    values, _ = drawn("lognormal", (9, 4))
    found = skewed_t.spread(values)
    assert found.skewness == pytest.approx(stats.skew(values, bias=False))
    assert found.std / 3 == pytest.approx(stats.sem(values))
    assert found.mean == pytest.approx(values.mean(0))
    tiny = skewed_t.spread(values * 1e-200)
    assert tiny.skewness == pytest.approx(found.skewness)


def test_the_longer_tail_has_the_longer_side() -> None:
    mean, (low, high) = (lambda each: (each.mean, each.interval))(mean_interval([0.0, 0, 1, 1, 2, 20]))
    reach = stats.t.ppf(0.975, 5) * stats.sem([0.0, 0, 1, 1, 2, 20])
    assert mean - low == pytest.approx(reach)
    assert reach < high - mean <= 4.5 * reach
    mirrored = mean_interval([0.0, 0, -1, -1, -2, -20])
    assert mirrored.interval == pytest.approx((-high, -low))


@pytest.mark.parametrize("value", [0.7, 0.1, -1 / 3, 1e-300, 0.0])
def test_an_interval_contains_its_estimate_also_where_all_values_are_one(value: float) -> None:
    """A mean of n times 0.7 is beside 0.7 for 54 of these n."""
    for n in range(2, 101):
        found = mean_interval([value] * n)
        assert found.mean == value
        assert found.interval == ((value, value) if n >= 5 else None)
        together = effects(np.full((n, 3), value))[0]
        assert together.simultaneous == found.interval
        assert together.d is None
    source = np.random.default_rng(0)
    for _ in range(200):
        near = mean_interval((0.7 + source.integers(-2, 3, 7) * 1e-16).tolist())
        assert near.interval[0] <= near.mean <= near.interval[1]


@pytest.mark.parametrize("n", range(6))
def test_few_values_have_a_mean_and_a_reason_in_place_of_an_interval(n: int) -> None:
    found = mean_interval(list(map(float, range(n))))
    assert found.mean == (pytest.approx((n - 1) / 2) if n else None)
    assert (found.interval is None) == (n < 5)
    assert (found.reason is None) == (n >= 5)
    if n < 5:
        assert found.reason.startswith(f"{n} value")
        assert "5 at least" in found.reason


def test_values_that_are_absent_do_not_count() -> None:
    values, _ = drawn("normal", (12, 3))
    holes = values.copy()
    holes[3:, 1] = np.nan
    holes[:, 2] = np.nan
    whole, some, none = (replace(each, simultaneous=None) for each in mean_intervals(holes))
    assert whole == mean_interval(values[:, 0].tolist())
    assert some == mean_interval(values[:3, 1].tolist())
    assert none == Estimate(None, None, 0, reason=none.reason)
    assert np.isnan(p_values(holes)[2])


def test_intervals_of_many_hold_together() -> None:
    """Of 300 results of 144 changes, at least 95 in 100 have no interval that misses: also with heavy tails on both sides."""
    source = np.random.default_rng(0)
    for values in (source.normal(0, 1, (16, 300 * 144)), source.standard_t(3, (16, 300 * 144))):
        low, high = skewed_t.interval(skewed_t.spread(values), skewed_t.of_family(144))
        misses = ((low > 0) | (high < 0)).reshape(300, 144).any(1)
        assert misses.mean() <= 0.05, misses.mean()
        alone = np.array(
            [(low > 0) | (high < 0) for low, high in [skewed_t.interval(skewed_t.spread(values[:, :144]))]]
        )
        assert alone.any()  # at the level of one, some miss
    found = mean_intervals(values[:, :144])
    assert all(each.simultaneous[0] <= each.interval[0] < each.interval[1] <= each.simultaneous[1] for each in found)


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
@pytest.mark.parametrize("n", [6, 16])
def test_what_is_called_significant_is_so_by_chance_in_5_of_100_results(kind: str, n: int) -> None:
    """Changes of either sign, of 30 heads that are alike, without any true change. A plain t test of each would find some in most results."""
    source = np.random.default_rng(n)
    false = naive = 0
    for _ in range(300):
        sizes = source.normal(0, 1, (n, 30)) if kind == "normal" else source.lognormal(0, 1, (n, 30))
        changes = sizes * source.choice([-1, 1], (n, 1)) + 0.3 * source.normal(0, 1, (n, 30))
        false += (p_values(changes) < 0.05).any()
        naive += (stats.ttest_1samp(changes, 0).pvalue < 0.05).any()
    assert false / 300 <= 0.075  # 5 %, and two standard errors
    assert naive / 300 > 0.10


def test_p_by_signs_is_that_of_enumeration_and_of_scipy() -> None:
    values, _ = drawn("normal", (7, 3))
    values -= 2.4
    size = np.sqrt((values**2).sum(0))
    patterns = [np.array(signs) @ values / size for signs in itertools.product([1, -1], repeat=7)]
    largest = np.abs(patterns).max(1)
    expected = [(largest >= each - 1e-9).mean() for each in np.abs(values.sum(0)) / size]
    assert p_values(values) == pytest.approx(expected)
    alone = stats.permutation_test((values[:, 0],), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert p_values(values[:, :1])[0] == pytest.approx(alone.pvalue)


def test_drawn_patterns_of_signs_give_about_the_same() -> None:
    values, _ = drawn("normal", (12, 1))
    values -= 2.5
    exact = np.mean(
        [
            abs(np.dot(signs, values[:, 0])) >= abs(values.sum()) - 1e-9
            for signs in itertools.product([1, -1], repeat=12)
        ]
    )
    assert p_values(values)[0] == pytest.approx(exact, abs=0.02)
    assert p_values(values, seed=1)[0] != p_values(values, seed=2)[0]
    assert p_values(values, seed=1)[0] == p_values(values, seed=1)[0]


def test_the_least_p_is_reached_by_changes_of_one_sign() -> None:
    for n in range(1, 11):
        assert p_values(np.ones((n, 1)) + np.arange(n)[:, None])[0] == pytest.approx(least_p(n))
    assert least_p(5) > 0.05 > least_p(6)


@pytest.mark.parametrize(("n_in", "n_out", "least"), [(3, 3, 0.1), (4, 4, 2 / 70), (3, 4, 1 / 35), (2, 5, 1 / 21)])
def test_the_least_p_of_two_groups_is_that_of_groups_that_do_not_overlap(n_in: int, n_out: int, least: float) -> None:
    assert permutation.least_p(n_in, n_out, 10_000) == pytest.approx(least)
    values = np.concatenate([np.arange(n_in) * 0.1 + 10, np.arange(n_out) * 0.11])[:, None]
    found = permutation.differences(values, np.arange(n_in + n_out) < n_in, 10_000)
    assert found.p[0] == pytest.approx(least, abs=0.01)
    assert permutation.least_p(20, 20, 10) == pytest.approx(1 / 11)


def test_effect_sizes_are_cohens() -> None:
    values, _ = drawn("normal", (9, 2))
    found = [each.d for each in effects(values)]
    assert found == pytest.approx(values.mean(0) / values.std(0, ddof=1))


def test_a_pair_without_a_difference_does_not_decide_a_part() -> None:
    """The head moves nothing to speak of; by the mean of ratios it would carry more than half."""
    wholes = np.array(SIX_PAIRS)
    moved = np.array([0.002, -0.001, 0.003, -0.002, -0.0015, 0.0297])
    assert (moved / wholes).mean() > 0.5
    found = part_of(moved, wholes)
    assert abs(found.mean) < 0.005
    assert found.mean == pytest.approx(moved[:5].sum() / wholes[:5].sum())
    assert (found.n, found.n_left_out) == (5, 1)
    assert found.interval[0] < found.mean < found.interval[1] < 0.02
    assert too_small(SIX_PAIRS).tolist() == [False] * 5 + [True]


def test_a_parts_interval_is_the_jackknifes() -> None:
    source = np.random.default_rng(0)
    wholes, moved = source.lognormal(0, 0.4, 8), source.normal(0.3, 0.3, 8)
    found = part_of(moved, wholes)
    whole_part = moved.sum() / wholes.sum()
    without = [np.delete(moved, n).sum() / np.delete(wholes, n).sum() for n in range(8)]
    moves = 7 * (whole_part - np.array(without))
    low, high = skewed_t.interval(skewed_t.spread(moves[:, None]))
    shift = whole_part - moves.mean()
    assert found.interval == pytest.approx((low[0] + shift, high[0] + shift))


def test_pairs_that_go_the_other_way_do_not_cancel() -> None:
    """A part of 0.4 of each difference, whichever its sign."""
    wholes = np.array([1.0, -1.0, 0.9, -0.9, 1.1, -1.1])
    found = part_of(0.4 * wholes, wholes)
    assert found.mean == pytest.approx(0.4)
    assert found.interval == pytest.approx((0.4, 0.4))


def test_parts_of_nothing() -> None:
    assert part_of([], []).mean is None
    none = part_of([0.1, 0.2], [0.0, 0.0])
    assert (none.mean, none.n, none.n_left_out) == (None, 0, 2)
    holes = parts_of([[0.1, np.nan]] * 5, [0.2] * 5)
    assert [each.mean for each in holes] == [pytest.approx(0.5), None]
    assert [each.n for each in holes] == [5, 0]


def test_mcnemar_is_that_of_scipy_and_of_enumeration() -> None:
    for gained, lost in itertools.product(range(5), repeat=2):
        flips = itertools.product([0, 1], repeat=gained + lost)
        away = abs(gained - (gained + lost) / 2)
        expected = np.mean([abs(sum(each) - (gained + lost) / 2) >= away for each in flips])
        assert mcnemar(gained, lost) == pytest.approx(expected)


def test_paired_changes() -> None:
    before, after = [0.0, 1, 0, 0, 1, 1, 0], [1.0, 1, 1, 0, 0, 1, 1]
    found = paired_change(before, after, range(7))
    assert (found.n_gained, found.n_lost, found.p) == (3, 1, mcnemar(3, 1))
    assert found.difference == mean_interval(np.subtract(after, before).tolist())
    shares = paired_change([0.5, 0.25], [1.0, 0.25], range(2))
    assert (shares.n_gained, shares.p) == (None, None)
    assert shares.difference.mean == pytest.approx(0.25)


def test_p_values_of_several_tasks_are_corrected_as_holm_says() -> None:
    changes = [paired_change([0.0] * 20, [1.0] * n + [0.0] * (20 - n), range(20)) for n in (8, 6, 0, 7)]
    changes.append(paired_change([0.5], [1.0], range(1)))
    found = corrected(changes)
    p = [each.p for each in changes[:4]]
    assert found[0].p_corrected == pytest.approx(4 * p[0])
    assert found[3].p_corrected == pytest.approx(3 * p[3])
    assert found[1].p_corrected == pytest.approx(2 * p[1])
    assert (found[2].p_corrected, found[4].p_corrected) == (1.0, None)
    assert paired.METHOD.endswith("over all lines")


def heads(n_layers: int, n_heads: int, share: float, rho: float, source: np.random.Generator) -> tuple[Array, Array]:
    """Two numbers of each head, [n_layers, n_heads], of whose variance a share is between layers."""
    shape = [[1, rho], [rho, 1]]
    layer = source.multivariate_normal([0, 0], shape, (n_layers, 1)) * share**0.5
    both = layer + source.multivariate_normal([0, 0], shape, (n_layers, n_heads)) * (1 - share) ** 0.5
    return both[..., 0], both[..., 1]


@pytest.mark.parametrize("share", [0.0, 0.87])
def test_a_rank_correlations_interval_holds_with_layers_that_are_alike(share: float) -> None:
    source = np.random.default_rng(0)
    true = 6 / np.pi * np.arcsin(-0.4 / 2)  # of normal numbers with correlation -0.4
    layers = np.repeat(np.arange(12), 8)
    held = narrow = 0
    for _ in range(120):
        first, second = (each.ravel() for each in heads(12, 8, share, -0.4, source))
        low, high = rank_correlation(first, second, layers).interval
        held += low <= true <= high
        as_if_independent = np.tanh(np.arctanh(spearman(first, second)) + np.array([-1, 1]) * 1.96 / 93**0.5)
        narrow += as_if_independent[0] <= true <= as_if_independent[1]
    assert 91 <= held / 1.2 <= 98.5, held / 1.2
    assert (narrow / 1.2 < 85) == (share > 0), narrow / 1.2  # what an interval over heads would cover


def test_a_rank_correlation_is_scipys_and_tells_of_layers() -> None:
    source = np.random.default_rng(1)
    first, second = heads(6, 5, 0.8, -0.5, source)
    layers = np.repeat(np.arange(6), 5)
    found = rank_correlation(first.ravel(), second.ravel(), layers)
    assert found.rho == pytest.approx(stats.spearmanr(first.ravel(), second.ravel()).statistic)
    within = [stats.spearmanr(*each).statistic for each in zip(first, second, strict=True)]
    assert found.within_layers.mean == pytest.approx(np.mean(within))
    assert (found.n_heads, found.n_layers, found.n_text_groups, found.interval_over) == (30, 6, 0, "layers")
    few = rank_correlation(first[:4].ravel(), second[:4].ravel(), layers[:20])
    assert few.interval is None
    assert few.reason.startswith("4 layers")
    same = rank_correlation(first.ravel(), np.zeros(30), layers)
    assert (same.rho, same.interval) == (None, None)


def test_other_texts_widen_a_rank_correlations_interval() -> None:
    """Groups of texts that agree add nothing; groups that do not, do."""
    source = np.random.default_rng(2)
    first, second = (each.ravel() for each in heads(8, 6, 0.5, -0.5, source))
    layers, tokens = np.repeat(np.arange(8), 6), np.full(10, 50.0)
    alone = rank_correlation(first, second, layers).interval
    same = ByGroup(np.tile(first, (10, 1)), np.tile(second, (10, 1)), tokens)
    agreed = rank_correlation(first, second, layers, same)
    assert agreed.interval == pytest.approx(rank_interval_with_freedom(alone, first, second, 7, 7), rel=1e-6)
    assert (agreed.n_text_groups, agreed.interval_over) == (10, "layers and texts")
    apart = ByGroup(same.first + source.normal(0, 3, same.first.shape), same.second, tokens)
    low, high = rank_correlation(first, second, layers, apart).interval
    assert low < agreed.interval[0]
    assert high > agreed.interval[1]


def rank_interval_with_freedom(
    interval: tuple[float, float], first: Array, second: Array, was: int, now: int
) -> list[float]:
    """The interval with another number of degrees of freedom."""
    z = np.arctanh(spearman(first, second))
    reach = np.arctanh(interval[1]) - z
    return np.tanh(z + np.array([-1, 1]) * reach * stats.t.ppf(0.975, now) / stats.t.ppf(0.975, was)).tolist()


def test_groups_of_texts_do_not_depend_on_order_or_batches() -> None:
    source = np.random.default_rng(0)
    texts = [source.integers(0, 99, source.integers(3, 9)).tolist() for _ in range(60)]
    rows = {tuple(each): source.normal(0, 1, (len(each), 2)) for each in texts}
    found = []
    for order, together in ((range(60), 60), (range(59, -1, -1), 7)):
        groups = TextGroups(2, [3])
        asked = [texts[number] for number in order]
        for start in range(0, 60, together):
            batch = asked[start : start + together]
            groups.add(3, groups.add_texts(batch), np.concatenate([rows[tuple(each)] for each in batch]))
        found.append(groups)
    one, other = found
    assert one.fingerprint == other.fingerprint
    assert one.n_tokens == other.n_tokens
    assert one.means(3) == pytest.approx(other.means(3))
    assert len(one.n_tokens) <= N_GROUPS
    together = (one.means(3) * np.array(one.n_tokens)[:, None]).sum(0) / sum(one.n_tokens)
    assert together == pytest.approx(np.concatenate(list(rows.values())).mean(0))
    changed = TextGroups(2, [3])
    changed.add_texts([*texts[:-1], texts[-1][::-1]])
    assert changed.fingerprint != one.fingerprint


def test_ratios_name_their_rule() -> None:
    assert "0.1 of the median" in ratios.METHOD


@pytest.mark.parametrize("noise", [0.1, 1e-4, 1e-8])
@pytest.mark.parametrize(("n_in", "n_out"), [(3, 3), (4, 4), (3, 5)])
def test_groups_that_hardly_vary_have_no_smaller_p_than_there_can_be(n_in: int, n_out: int, noise: float) -> None:
    """Cohen's d is up to 1e8 here; the mirror image of the labels is as large as the labels themselves."""
    group = np.arange(n_in + n_out) < n_in
    least = permutation.least_p(n_in, n_out, 2000)
    for seed in range(3):
        values = group[:, None] + noise * np.random.default_rng(seed).normal(size=(n_in + n_out, 1))
        found = permutation.differences(values, group, seed=seed, rounding=0.0)
        assert found.p[0] > least - 3 * np.sqrt(least / 2000)
        groups = [values[group, 0], values[~group, 0]]
        pooled = sum(((each - each.mean()) ** 2).sum() for each in groups) / (n_in + n_out - 2)
        assert found.d[0] == pytest.approx((groups[0].mean() - groups[1].mean()) / np.sqrt(pooled), rel=1e-5)


def test_what_is_no_number_counts_nowhere() -> None:
    others = np.random.default_rng(0).normal(size=(99, 4))
    p = p_beside_placebos([np.nan, 0.01, 0.2, 9.0], others)
    assert np.isnan(p[0])
    np.testing.assert_array_equal(p[1:], p_beside_placebos([0.01, 0.2, 9.0], others[:, 1:]))
    found = part_of([1, 1, 1, 1, 50, 1, 1], [1, 1, np.nan, 1, 0.001, 1, np.inf])
    assert (found.mean, found.n, found.n_left_out) == (1.0, 4, 3)

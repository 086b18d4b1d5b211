"""Intervals and tests against closed forms, published values and their own promise of coverage."""

import math

import numpy as np
import pytest

from core_torl.evaluation.statistics import bootstrap_mean, holm, mcnemar, paired_difference, t_mean, wilson


def test_wilson_known_values():
    estimate = wilson(8, 10)
    assert (estimate.value, estimate.n) == (0.8, 10)
    # The textbook case: eight in ten at 95 % give 0.490 to 0.943.
    assert estimate.low == pytest.approx(0.4901625, abs=1e-7)
    assert estimate.high == pytest.approx(0.9433178, abs=1e-7)


def test_wilson_at_the_ends_has_its_closed_form():
    z2 = 1.959963984540054**2
    none, every = wilson(0, 20), wilson(20, 20)
    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(z2 / (20 + z2))
    assert every.low == pytest.approx(20 / (20 + z2))


def test_wilson_narrows_with_n_and_widens_with_confidence():
    width = lambda e: e.high - e.low  # noqa: E731
    assert width(wilson(80, 100)) < width(wilson(8, 10)) < width(wilson(8, 10, confidence=0.99))


def test_wilson_covers_as_often_as_it_says():
    successes = np.random.default_rng(0).binomial(40, 0.7, size=2000)
    hits = [(e := wilson(int(s), 40)).low <= 0.7 <= e.high for s in successes]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_t_mean_has_its_closed_form():
    estimate = t_mean([1.0, 2.0, 6.0])
    half = 4.302652729911275 * math.sqrt(7 / 3)  # t with 2 degrees of freedom; the variance is 7
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3 - half, 3 + half))
    assert (estimate.n, estimate.method) == (3, "t over 3 values")
    one = t_mean([4.0])
    assert one.value == 4 and math.isnan(one.low) and math.isnan(one.high) and one.method.startswith("no interval")
    with pytest.raises(ValueError, match="t_mean: values"):
        t_mean([])


def test_t_mean_of_three_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.5, 0.1, size=(2000, 3))
    hits = [(e := t_mean(row.tolist())).low <= 0.5 <= e.high for row in draws]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_bootstrap_of_a_large_normal_sample_is_near_its_closed_form():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    estimate = bootstrap_mean(values.tolist(), seed=2)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert estimate.method == "BCa bootstrap over items"
    assert estimate.n == 400


def test_bootstrap_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = [(e := bootstrap_mean(rng.normal(size=40), seed=i, resamples=300)).low <= 0 <= e.high for i in range(200)]
    assert 0.89 <= np.mean(hits) <= 0.98  # a bootstrap of 40 values is slightly short of 95 %


def test_bootstrap_is_repeatable_and_its_seed_matters():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 3.0, 0.25]
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5, resamples=200) != bootstrap_mean(values, seed=6, resamples=200)


@pytest.mark.parametrize("values", [[0.1] * 7, [2.5]])
def test_degenerate_values_give_a_point_and_say_so(values, recwarn):
    estimate = bootstrap_mean(values)
    assert (estimate.low, estimate.value, estimate.high) == (values[0],) * 3
    assert estimate.method == "percentile (degenerate)"
    assert not recwarn.list


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(4)
    before = rng.normal(0, 10, size=100)
    after = before + 0.5 + rng.normal(0, 0.1, size=100)
    estimate = paired_difference(before.tolist(), after.tolist())
    assert estimate.value == pytest.approx(0.5, abs=0.05)
    assert 0.4 < estimate.low < estimate.value < estimate.high < 0.6  # unpaired it would be about 2.8 to each side
    assert paired_difference(after.tolist(), before.tolist()).value == pytest.approx(-estimate.value)


def test_clusters_that_move_together_widen_the_interval():
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(20), 10)
    after = rng.normal(0, 1, size=20)[clusters] + rng.normal(0, 0.1, size=200)
    items = paired_difference([0.0] * 200, after.tolist())
    whole = paired_difference([0.0] * 200, after.tolist(), clusters=[f"run-{c}" for c in clusters])
    assert whole.value == pytest.approx(items.value)
    # Equal clusters of ten that agree inside: the standard error grows by about sqrt(10).
    assert 2.5 < (whole.high - whole.low) / (items.high - items.low) < 4.0
    assert (items.n, whole.n) == (200, 20)
    assert whole.method == "BCa bootstrap over clusters"


def test_clusters_of_one_item_each_are_the_item_bootstrap():
    before, after = [0.0, 1.0, 0.0, 1.0, 0.5], [1.0, 1.0, 0.0, 0.5, 2.0]
    alone = paired_difference(before, after, seed=1)
    single = paired_difference(before, after, clusters=list("abcde"), seed=1)
    assert (single.value, single.low, single.high) == pytest.approx((alone.value, alone.low, alone.high))


def test_unequal_clusters_keep_the_mean_over_items():
    estimate = paired_difference([0.0] * 4, [1.0, 1.0, 1.0, 0.0], clusters=["a", "a", "a", "b"])
    assert estimate.value == 0.75


def test_a_drawn_cluster_brings_its_own_size():
    clusters = np.repeat(np.arange(10), np.arange(1, 11))
    after = 1 + np.random.default_rng(6).normal(0, 0.01, size=len(clusters))
    estimate = paired_difference([0.0] * len(clusters), after.tolist(), clusters=clusters.tolist())
    assert 0.98 < estimate.low < estimate.high < 1.02  # sums drawn apart from sizes would spread over 0.5 to 2
    agreed = paired_difference([0.0] * len(clusters), [1.0] * len(clusters), clusters=clusters.tolist())
    assert (agreed.low, agreed.high, agreed.method) == (1.0, 1.0, "percentile (degenerate)")


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(5, 0, 2 / 32), (0, 5, 2 / 32), (7, 1, 2 * (1 + 8) / 256), (3, 3, 1.0), (0, 0, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_of_the_changed_items(won, lost, p):
    before = [False] * won + [True] * lost + [True, False] * 10
    after = [True] * won + [False] * lost + [True, False] * 10
    assert mcnemar(before, after) == pytest.approx(p)


def test_holm_by_hand():
    # Sorted: .01 x 4 = .04, .02 x 3 = .06, .03 x 2 = .06, .9 x 1 = .9
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    # .01 x 3 = .03, .02 x 2 = .04, and .035 x 1 may not fall below .04
    assert holm([0.01, 0.02, 0.035]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(0, 0),
        lambda: wilson(3, 2),
        lambda: wilson(-1, 2),
        lambda: wilson(1, 2, confidence=95),
        lambda: bootstrap_mean([]),
        lambda: bootstrap_mean([1.0, math.nan]),
        lambda: bootstrap_mean([1.0, 2.0], confidence=1.0),
        lambda: bootstrap_mean([1.0, 2.0], resamples=0),
        lambda: paired_difference([], []),
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: paired_difference([1.0, 0.0], [1.0, 2.0], clusters=["a"]),
        lambda: mcnemar([], []),
        lambda: mcnemar([True], [True, False]),
        lambda: mcnemar([0.5], [1.0]),
        lambda: holm([]),
        lambda: holm([1.2]),
        lambda: holm([math.nan]),
    ],
)
def test_wrong_input_is_a_one_line_value_error(call):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) and "\n" not in str(error.value)

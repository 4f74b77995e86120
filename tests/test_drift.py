"""Drift statistics: right where the answer is known, and quiet as often as their limits say."""

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metagrad_filter.errors import ConfigError
from metagrad_filter.monitor import drift
from metagrad_filter.monitor.drift import Cusum
from metagrad_filter.monitor.sketch import ScoreSketch

counts = st.lists(st.integers(0, 1000), min_size=2, max_size=64).filter(sum)


def reference(seed: int = 0, n: int = 4096) -> list[float]:
    sample = np.random.default_rng([seed, 7]).normal(size=n)
    return np.quantile(sample, np.linspace(0, 1, 257)).tolist()


@given(counts)
def test_statistics_are_zero_for_equal_and_positive_for_other_counts(values):
    assert drift.psi(values, values) == 0 and drift.ks(values, values) == 0
    turned = values[1:] + values[:1]
    if turned != values:
        assert drift.psi(values, turned) > 0 and 0 < drift.ks(values, turned) <= 1
        assert drift.psi(values, turned) == pytest.approx(drift.psi(turned, values))


def test_one_window_is_a_sample_and_no_share():
    assert drift.psi([0, 1], [0, 1]) == 0
    assert 0 < drift.psi([0, 1], [1, 0]) < math.inf


def test_psi_and_ks_are_their_definitions():
    p, q = np.array([30.5, 70.5]) / 101, np.array([0.5, 0.5])
    assert drift.psi([30, 70]) == pytest.approx(((p - q) * np.log(p / q)).sum())
    assert drift.ks([30, 70]) == pytest.approx(0.2)
    assert drift.ks([10, 0, 10], [10, 10, 0]) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "level"), [(512, 0.02), (4096, 0.02), (32768, 0.02)])
def test_limits_are_passed_as_often_as_they_say(n, level):
    """Real samples and real references, so that the simulation inside is not its own judge."""
    rng = np.random.default_rng(n)
    runs = 600
    passed = np.zeros(2)
    for _ in range(runs):
        quantiles = np.quantile(rng.random(4096), np.arange(1, 64) / 64)
        # Uniform scores: how many fall between two quantiles is multinomial in the gaps.
        bins = rng.multinomial(n, np.diff([0, *quantiles, 1]))
        passed += [
            drift.psi(bins) > drift.psi_limit(n, level=level),
            drift.ks(bins) > drift.ks_limit(n, level=level),
        ]
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], runs, level)
    assert np.all((low <= passed) & (passed <= high)), passed


@pytest.mark.parametrize("n", [100, 512, 4096, 100_000])
def test_limits_shrink_with_windows_and_grow_with_rarity(n):
    for limit in (drift.psi_limit, drift.ks_limit):
        values = [limit(n, level=level) for level in (0.1, 0.01, 1e-3, 1e-4, 1e-6)]
        assert values == sorted(values)
        assert limit(4 * n) < limit(n)
        # However many windows there are, the reference's own error stays.
        assert limit(10**9) > 0.5 * limit(10**9, reference=2048)


def test_two_sketches_of_one_stream_are_within_the_limit_and_others_are_not():
    rng = np.random.default_rng(3)
    a, b = (ScoreSketch.of(rng.normal(size=4000), reference()) for _ in range(2))
    c = ScoreSketch.of(rng.normal(0.3, 1, 4000), reference())
    limit = drift.psi_limit(a.count, reference=b.count, level=1e-4)
    assert drift.psi(a.bins, b.bins) < limit < drift.psi(c.bins, b.bins)
    limit = drift.ks_limit(a.count, reference=b.count, level=1e-4)
    assert drift.ks(a.bins, b.bins) < limit < drift.ks(c.bins, b.bins)


@pytest.mark.parametrize("shift", [0.3, -0.5, 5.0])
def test_wasserstein_is_the_shift_of_a_shifted_sample(shift):
    rng = np.random.default_rng(4)
    values = rng.normal(size=100_000) + shift
    distance = drift.wasserstein(ScoreSketch.of(values, reference()), reference())
    assert distance == pytest.approx(abs(shift), rel=0.1)


def test_wasserstein_is_that_of_scipy_where_scale_changes():
    rng = np.random.default_rng(5)
    base, wide = rng.normal(size=100_000), rng.normal(0, 1.3, 100_000)
    quantiles = np.quantile(base, np.linspace(0, 1, 257)).tolist()
    mine = drift.wasserstein(ScoreSketch.of(wide, quantiles), quantiles)
    assert mine == pytest.approx(stats.wasserstein_distance(base, wide), rel=0.15)


def test_wasserstein_limit_is_passed_by_a_shift_and_not_by_chance():
    rng = np.random.default_rng(6)
    values, passed = reference(6), 0
    limit = drift.wasserstein_limit(4096, values, level=0.01)
    for seed in range(200):
        quantiles = reference(seed)
        sketch = ScoreSketch.of(rng.normal(size=4096), quantiles)
        passed += drift.wasserstein(sketch, quantiles) > limit
    assert passed <= stats.binom.ppf(1 - 1e-4, 200, 0.01)
    shifted = ScoreSketch.of(rng.normal(0.2, 1, 4096), values)
    assert drift.wasserstein(shifted, values) > limit
    with pytest.raises(ConfigError, match=r"level is 1e-05, expected >= 0\.002"):
        drift.wasserstein_limit(4096, values, level=1e-5)


def test_reference_moments_are_those_of_the_sample():
    mean, deviation = drift.reference_moments(reference())
    sample = np.random.default_rng([0, 7]).normal(size=4096)
    assert mean == pytest.approx(sample.mean(), abs=0.005)
    assert deviation == pytest.approx(sample.std(), rel=0.01)


def test_scores_that_many_windows_share_are_no_drift():
    rng = np.random.default_rng(8)

    def draw(n):
        values = rng.normal(size=n).astype(np.float32)
        return np.where(rng.random(n) < 0.2, np.float32(0.37), values)

    quantiles = np.quantile(draw(4096), np.linspace(0, 1, 257)).astype(np.float32).tolist()
    bins = ScoreSketch.of(draw(20_000), quantiles).bins
    joined, shares = drift.merge_atoms(bins, quantiles)
    assert len(joined) < 64 and joined.sum() == 20_000 and shares.sum() == pytest.approx(1)
    limit = drift.psi_limit(20_000, bins=len(joined))
    assert drift.psi(joined, shares) < limit < drift.psi(bins)


def test_bins_without_shared_scores_stay_as_they_are():
    bins = np.arange(64)
    joined, shares = drift.merge_atoms(bins, reference())
    assert joined.tolist() == bins.tolist() and np.allclose(shares, 1 / 64)
    joined, shares = drift.merge_atoms(bins, [1.0] * 257)
    assert joined.tolist() == [bins.sum()] and shares.tolist() == [1.0]


@pytest.mark.parametrize("run_length", [100, 1000])
def test_the_cumulative_sum_alarms_once_in_its_run_length(run_length):
    limit = drift.cusum_limit(0.5, run_length)
    rng = np.random.default_rng(9)
    lengths = []
    for _ in range(120):
        sums, length = Cusum(0.5), 0
        while sums.value <= limit:
            sums, length = sums.add(rng.standard_normal()), length + 1
        lengths.append(length)
    assert 0.7 * run_length < np.mean(lengths) < 1.4 * run_length
    # Published for allowance 1/2 and limit 5, two-sided: 465 (Montgomery, table 9.3).
    assert drift.cusum_limit(0.5, 465) == pytest.approx(5.0, abs=0.25)
    assert drift.cusum_limit(0.5, 1e6) == pytest.approx(
        drift.cusum_limit(0.5, 1e5) + math.log(10), abs=1e-9
    )


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_the_cumulative_sum_finds_a_shift_that_single_values_hide(shift):
    limit = drift.cusum_limit(0.5, 1e4)
    rng = np.random.default_rng(10)
    sums = Cusum(0.5)
    for _ in range(60):
        sums = sums.add(rng.standard_normal() + shift)
    assert sums.value > limit
    assert (sums.high > sums.low) == (shift > 0)


@pytest.mark.skipif(
    importlib.util.find_spec("river") is None, reason="river (extra [drift]) is not installed"
)
def test_adwin_finds_the_change_and_nothing_before_it():
    rng = np.random.default_rng(11)
    values = np.concatenate([rng.normal(size=300), rng.normal(2, 1, 100)])
    changes = drift.adwin_changes(values)
    assert changes and 300 <= changes[0] < 340


@pytest.mark.skipif(importlib.util.find_spec("river") is not None, reason="river is installed")
def test_without_river_adwin_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install 'metagrad-filter\[drift\]'"):
        drift.adwin_changes([0.0])


@given(st.integers(0, 200), st.integers(0, 200))
def test_wilson_limits_are_those_of_scipy(successes, more):
    n = successes + more
    if not n:
        assert drift.wilson(0, 0) == (0.0, 1.0)
        return
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert drift.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_group_shares_say_who_is_favoured():
    shares = drift.group_shares({"web": [800, 100], "code": [200, 150], "none": [0, 0]})
    assert shares["web"].stream_share == 0.8 and shares["web"].kept_share == 0.4
    assert shares["web"].high < 0.8 and shares["code"].low > 0.2
    assert shares["none"].kept_share == 0 and shares["none"].seen == 0


def test_mean_shift_is_welchs_test():
    rng = np.random.default_rng(12)
    a, b = rng.normal(0, 1, 40), rng.normal(1, 3, 25)
    fields = [
        {"count": len(v), "mean": v.mean(), "m2": ((v - v.mean()) ** 2).sum()} for v in (a, b)
    ]
    value, limit = drift.mean_shift(*fields, level=0.05)
    expected: Any = stats.ttest_ind(b, a, equal_var=False)
    assert value == pytest.approx(expected.statistic)
    assert limit == pytest.approx(stats.t.isf(0.025, expected.df))
    still = {"count": 5, "mean": 2.0, "m2": 0.0}
    assert drift.mean_shift(still, still)[0] == 0
    assert drift.mean_shift(still, still | {"mean": 1.0})[0] == -math.inf
    with pytest.raises(ConfigError, match="counts are 1 and 5"):
        drift.mean_shift(still | {"count": 1}, still)


def test_rank_agreement_and_its_interval():
    rng = np.random.default_rng(13)
    scores = rng.normal(size=300)
    labels = scores + rng.normal(size=300)
    rho, low, high = drift.rank_agreement(scores, np.exp(labels), 0)
    expected: Any = stats.spearmanr(scores, labels)
    assert rho == pytest.approx(expected.statistic)
    assert low < rho < high and high - low < 0.2
    assert drift.rank_agreement(scores, labels, 0) == drift.rank_agreement(scores, labels, 0)
    assert drift.rank_agreement(scores, labels, 1)[1:] != (low, high)
    assert drift.rank_agreement(np.ones(9), np.arange(9), 0) == (0.0, 0.0, 0.0)
    unrelated = drift.rank_agreement(scores, rng.normal(size=300), 0)
    assert unrelated[1] < 0 < unrelated[2]


def test_the_interval_of_rank_agreement_covers():
    rng = np.random.default_rng(14)
    truth = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of a normal pair, Pearson's 0.6
    covered = 0
    for seed in range(100):
        a = rng.normal(size=150)
        b = 0.6 * a + 0.8 * rng.normal(size=150)
        _, low, high = drift.rank_agreement(a, b, seed, draws=200)
        covered += low <= truth <= high
    assert covered >= 86


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drift.psi([1]), "K >= 2"),
        (lambda: drift.psi([0, 0]), "not all zero"),
        (lambda: drift.ks([1, -1]), ">= 0"),
        (lambda: drift.ks([1, 2], [1, 2, 3]), r"\(2,\) and \(3,\)"),
        (lambda: drift.psi_limit(0), "n is 0"),
        (lambda: drift.ks_limit(100, level=0), "level 0"),
        (lambda: drift.psi_limit(100, reference=100), "reference 100"),
        (lambda: drift.cusum_limit(0.0, 100), r"allowance is 0.0"),
        (lambda: drift.wasserstein(ScoreSketch(), reference()), "empty"),
        (lambda: drift.adwin_changes([], delta=1), "delta is 1"),
        (lambda: drift.wilson(3, 2), "successes is 3 of n 2"),
        (lambda: drift.rank_agreement([1, 2], [1, 2], 0), "n >= 3"),
        (lambda: drift.rank_agreement([1, 2, math.nan], [1, 2, 3], 0), "NaN"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()

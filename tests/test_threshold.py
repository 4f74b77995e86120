"""The threshold rule: the ratio holds whatever the scores do, and a restored rule goes on."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagrad_filter.errors import StateMismatch
from metagrad_filter.threshold import Threshold

LEVELS = np.linspace(0, 1, 257)


def reference(sample) -> list[float]:
    return np.quantile(sample, LEVELS).tolist()


def run(rule, scores) -> np.ndarray:
    return np.array([rule.offer(score) for score in scores])


def scenario(name: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    base, time = rng.normal(size=n), np.arange(n) / n
    return {
        "stationary": base,
        "abrupt shift": base + 1.5 * (time > 0.5),
        "abrupt fall": base - 4 * (time > 0.5),
        "slow drift": base * np.sqrt(1 + 3 * time) + 2 * time,
        "equal scores": np.zeros(n),
        "atoms": np.where(rng.random(n) < 0.2, 0.3, base),
        "unshuffled shards": base + np.repeat(rng.normal(size=n // 1000), 1000),
        "swings": base + np.repeat(rng.choice([-9.0, 9.0], n // 500), 500),
        "adversary": np.where(time % 0.2 < 0.1, -1e30, 1e30),
        "not finite": np.where(rng.random(n) < 0.3, np.nan, base),
    }[name]


@pytest.mark.parametrize(
    "ratio", [Fraction(1, 50), Fraction(1, 10), Fraction(3, 10), Fraction(4, 5)]
)
@pytest.mark.parametrize(
    "name",
    [
        "stationary", "abrupt shift", "abrupt fall", "slow drift", "equal scores", "atoms",
        "unshuffled shards", "swings", "adversary", "not finite",
    ],
)  # fmt: skip
def test_any_ten_thousand_windows_keep_the_ratio_within_a_percentage_point(name, ratio):
    scores = scenario(name, 30_000)
    rule = Threshold(ratio)
    rule.begin(reference(np.random.default_rng(2).normal(size=4096)), math.inf)
    kept = np.concatenate([[0], np.cumsum(run(rule, scores.tolist()))])
    shares = (kept[10_000:] - kept[:-10_000]) / 10_000
    assert np.abs(shares - float(ratio)).max() <= 0.01
    assert rule.seen == 30_000 and rule.kept == kept[-1]


@pytest.mark.parametrize("swap", ["reference", "none"])
def test_the_ratio_holds_over_swaps_to_scorers_of_another_scale(swap):
    rng = np.random.default_rng(3)
    rule, kept = Threshold(Fraction(1, 4)), []
    for _ in range(8):
        scale, offset = 10.0 ** rng.integers(-6, 6), rng.normal() * 100
        scores = offset + scale * rng.normal(size=4_000)
        quantiles = reference(offset + scale * rng.normal(size=4096))
        rule.begin(quantiles if swap == "reference" else None, math.inf)
        kept += run(rule, scores.tolist()).tolist()
    total = np.concatenate([[0], np.cumsum(kept)])
    assert np.abs((total[10_000:] - total[:-10_000]) / 10_000 - 0.25).max() <= 0.01


def test_the_best_are_kept():
    scores = np.random.default_rng(4).normal(size=20_000)
    rule = Threshold(Fraction(3, 10))
    rule.begin(reference(scores[:4096]), math.inf)
    mask = run(rule, scores.tolist())
    best = np.sort(scores)[-mask.sum() :].mean()
    assert scores[mask].mean() > 0.98 * best
    assert abs(rule.score - np.quantile(scores, 0.7)) < 0.1


def test_strength_zero_draws_by_lot_and_a_finite_strength_lies_between():
    rng = np.random.default_rng(5)
    scores = rng.normal(size=12_000)
    means = []
    for strength in (0.0, 1.0, 8.0, math.inf):
        rule = Threshold(Fraction(1, 4))
        rule.begin(reference(rng.normal(size=4096)), strength)
        means.append(scores[run(rule, scores.tolist())].mean())
    assert abs(means[0]) < 0.06 and means[0] < means[1] < means[2] <= means[3] + 0.02
    assert math.isnan(Threshold(Fraction(1, 4)).score)


def test_the_exploration_share_is_kept_by_lot():
    scores = np.random.default_rng(6).normal(size=20_000)
    rule = Threshold(Fraction(1, 4), explore=0.2)
    rule.begin(reference(scores[:4096]), math.inf)
    mask = run(rule, scores.tolist())
    low = mask & (scores < 0)
    # A fifth of the kept come from everywhere, half of them from below the median.
    assert 0.07 < low.sum() / mask.sum() < 0.13


def test_randomness_is_keyed_by_seed_and_name():
    scores = np.zeros(1000).tolist()

    def draw(**options):
        rule = Threshold(Fraction(1, 4), **options)
        rule.begin(None, 0.0)
        return run(rule, scores).tolist()

    assert draw() == draw()
    assert draw() != draw(seed=1) != draw(name="other")


@settings(max_examples=25, deadline=None)
@given(
    at=st.integers(0, 700),
    strength=st.sampled_from([0.0, 2.0, math.inf]),
    known=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_restored_rule_goes_on_bit_for_bit(at, strength, known, seed):
    scores = np.random.default_rng(seed).normal(size=1_000).tolist()
    quantiles = reference(scores) if known else None
    rule = Threshold(Fraction(1, 3), seed=seed)
    rule.begin(quantiles, strength)
    run(rule, scores[:at])
    state = json.loads(json.dumps(rule.state(), allow_nan=False))
    rest = run(rule, scores[at:]).tolist()
    other = Threshold(Fraction(1, 3), seed=seed)
    other.restore(state, quantiles)
    assert other.state() == state
    assert run(other, scores[at:]).tolist() == rest
    assert other.state() == rule.state()
    assert len(json.dumps(state)) < 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("counts"), "fields"),
        (lambda state: state.update(counts="AAAA"), "cannot be read|counts"),
        (lambda state: state.update(counts="not base64!"), "cannot be read"),
        (lambda state: state.update(pending=state["counts"] * 2), "pending|cannot be read"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    rule = Threshold(Fraction(1, 3))
    state = rule.state()
    change(state)
    with pytest.raises(StateMismatch, match=message):
        rule.restore(state)


def test_a_state_that_is_no_state_is_refused():
    with pytest.raises(StateMismatch, match="list"):
        Threshold(Fraction(1, 3)).restore([])  # pyright: ignore[reportArgumentType]

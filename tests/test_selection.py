"""Exactly k of M, in exact arithmetic, with ties and randomness that depend on nothing else."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.errors import ConfigError
from metagrad_filter.selection import (
    as_ratio,
    as_share,
    block_of_kept,
    kept_before,
    rank_scores,
    select,
)

ratios = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)


@pytest.mark.parametrize(
    "bad", [0, 0.0, -0.0, -0.1, 1.5, math.nan, math.inf, "0.5", True, np.True_, None, 1j, [0.5]]
)
def test_keep_ratio_outside_its_domain_is_refused_with_the_value(bad):
    with pytest.raises(ConfigError) as error:
        as_ratio(bad)
    assert repr(bad) in str(error.value) and "(0, 1]" in str(error.value)


def test_keep_ratio_is_the_decimal_that_was_written():
    assert as_ratio(0.1) == Fraction(1, 10)
    assert as_ratio(np.float32(0.1)) == Fraction(1, 10)
    assert as_ratio(1) == as_ratio(1.0) == 1
    assert as_ratio(1e-7) == Fraction(1, 10**7)
    assert as_ratio(Fraction(1, 3)) == Fraction(1, 3)


def test_explore_may_be_zero_but_not_negative():
    assert as_share(0) == 0 and as_share(1) == 1
    with pytest.raises(ConfigError, match="explore"):
        as_share(-0.5)


@given(ratios, st.integers(1, 64), st.integers(0, 5000))
def test_quotas_add_up_and_every_kept_index_finds_its_block(ratio, block_windows, index):
    block = block_of_kept(index, ratio, block_windows)
    first = kept_before(block * block_windows, ratio)
    last = kept_before((block + 1) * block_windows, ratio)
    assert first <= index < last
    assert last - first in {
        math.floor(block_windows * ratio),
        math.floor(block_windows * ratio) + 1,
    }


@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf]), max_size=60
    ),
    st.data(),
)
def test_hard_selection_keeps_the_k_best_and_ties_go_to_the_earlier(values, data):
    scores = np.array(values, np.float32)
    n = len(scores)
    k = data.draw(st.integers(0, n))
    kept = select(scores, n, k)
    assert kept.dtype == np.int64 and len(kept) == k
    assert np.all(np.diff(kept) > 0)
    order = sorted(range(n), key=lambda i: (not math.isfinite(values[i]), _cost(values[i]), i))
    assert kept.tolist() == sorted(order[:k])


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_equal_scores_keep_the_first_of_many(value):
    assert select(np.full(5000, value, np.float32), 5000, 700).tolist() == list(range(700))
    signs = np.where(np.arange(5000) % 3 == 0, -0.0, 0.0).astype(np.float32)
    assert select(signs, 5000, 700).tolist() == list(range(700))


def _cost(value: float) -> float:
    return -value if math.isfinite(value) else 0.0


@given(
    st.integers(1, 80),
    st.data(),
    st.sampled_from([0.0, 0.5, 3.0, math.inf]),
    st.sampled_from([0, 0.1, Fraction(1, 2), 1]),
)
def test_exactly_k_distinct_whatever_the_rule(n, data, strength, explore):
    k = data.draw(st.integers(0, n))
    scores = np.random.default_rng(n).normal(size=n).astype(np.float32)
    for given_scores in (scores, None):
        kept = select(
            given_scores, n, k, strength=strength, explore=explore, seed=3, name="a", block=7
        )
        assert len(set(kept.tolist())) == k
        assert k == 0 or (kept.min() >= 0 and kept.max() < n)


def test_randomness_is_keyed_by_seed_name_and_block_only():
    def draw(**key):
        return select(None, 64, 16, **key).tolist()

    base = draw(seed=1, name="a", block=5)
    assert base == draw(seed=1, name="a", block=5)
    assert base != draw(seed=2, name="a", block=5)
    assert base != draw(seed=1, name="b", block=5)
    assert base != draw(seed=1, name="a", block=6)


def test_the_stream_of_a_seed_never_changes():
    # Golden values: a change here changes every training stream in the world.
    assert select(None, 16, 4, seed=0, name="default", block=0).tolist() == UNIFORM_GOLDEN
    scores = np.arange(16, dtype=np.float32)
    assert select(scores, 16, 4, strength=1.0, seed=0, block=1).tolist() == GUMBEL_GOLDEN
    assert select(scores, 16, 4, explore=0.5, seed=0, block=1).tolist() == EXPLORE_GOLDEN


def test_uniform_selection_is_uniform():
    counts = np.zeros(20)
    for block in range(2000):
        counts[select(None, 20, 5, block=block)] += 1
    # Binomial(2000, 1/4): standard deviation 19.4.
    assert np.all(np.abs(counts - 500) < 5 * 19.4)


def test_strength_zero_is_uniform_and_growing_strength_approaches_top_k():
    scores = np.random.default_rng(0).normal(size=64).astype(np.float32)

    def mean(strength):
        chosen = [select(scores, 64, 16, strength=strength, block=b) for b in range(300)]
        return np.mean([scores[c].mean() for c in chosen])

    best = scores[select(scores, 64, 16)].mean()
    assert abs(mean(0.0) - scores.mean()) < 0.05
    assert mean(0.0) < mean(1.0) < mean(4.0) < best + 1e-6
    assert mean(1e6) == pytest.approx(best)


def test_exploration_share_leaves_the_rest_of_the_ranking_alone():
    scores = np.arange(100, dtype=np.float32)
    kept = select(scores, 100, 20, explore=0.25, block=9)
    assert set(range(85, 100)) <= set(kept.tolist())
    assert sum(p < 85 for p in kept) == 5


def test_rank_scores_give_ties_one_value():
    ranks = rank_scores(np.array([2.0, 1.0, 2.0, np.nan], np.float32))
    assert ranks[0] == ranks[2] > ranks[1] > ranks[3]
    assert abs(ranks.sum()) < 1e-12


def test_impossible_quota_and_shape_are_refused():
    with pytest.raises(ConfigError, match="k is 5"):
        select(None, 4, 5)
    with pytest.raises(ConfigError, match="shape"):
        select(np.zeros(3, np.float32), 4, 2)


UNIFORM_GOLDEN = [3, 6, 11, 12]
GUMBEL_GOLDEN = [6, 10, 13, 15]
EXPLORE_GOLDEN = [6, 7, 14, 15]

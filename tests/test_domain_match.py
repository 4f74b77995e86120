"""Domain match: it finds the target's domain, and being a negative costs a window nothing."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from metagrad_filter.demo.domain_match import (
    BIGRAM_BUCKETS,
    PENALTIES,
    domain_match_scores,
    ngram_features,
)
from metagrad_filter.errors import ConfigError, WindowError


def text(rng: np.random.Generator, rows: int, *, start: int, length: int = 24) -> np.ndarray:
    """Rows of a domain: ids drawn unevenly from 40 that begin at `start`; domains overlap."""
    share = 1.0 / np.arange(1, 41)
    return (start + rng.choice(40, (rows, length), p=share / share.sum())).astype(np.int32)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    target = text(rng, 64, start=0)
    near, far = text(rng, 300, start=0), text(rng, 300, start=6)
    order = rng.permutation(600)
    pool = np.concatenate([near, far])[order]
    return target, pool, (order < 300)


def test_the_top_half_is_the_targets_domain(world):
    target, pool, near = world
    scores = domain_match_scores(target, pool, seed=0)
    assert scores.shape == (600,) and scores.dtype == np.float32
    assert near[np.argsort(-scores)[:300]].mean() > 0.9


def test_word_order_is_seen_through_bigrams():
    rng = np.random.default_rng(1)
    pairs = np.arange(40).reshape(20, 2)

    def ordered(rows):
        return pairs[rng.integers(0, 20, (rows, 12))].reshape(rows, 24).astype(np.int32)

    pool = np.concatenate([ordered(300), rng.permuted(ordered(300), axis=1)])
    scores = domain_match_scores(ordered(64), pool, seed=0)
    assert (np.argsort(-scores)[:300] < 300).mean() > 0.95


def test_scores_depend_on_the_seed_only(world):
    target, pool, _ = world
    first = domain_match_scores(target, pool, seed=5)
    np.testing.assert_array_equal(domain_match_scores(target, pool, seed=5), first)
    assert (domain_match_scores(target, pool, seed=6) != first).any()


def test_serving_as_a_negative_does_not_lower_a_score(world):
    """Cross-fitting: with few negatives, those drawn score like the windows that were not."""
    target, pool, near = world
    means = []
    for seed in range(12):
        order = np.random.default_rng(seed).permutation(len(pool))
        drawn = np.concatenate([half[:100] for half in np.array_split(order, 2)])
        is_drawn = np.isin(np.arange(len(pool)), drawn)
        scores = domain_match_scores(target, pool, train_windows=100, seed=seed)
        spread = scores[near].std()
        gap = scores[near & is_drawn].mean() - scores[near & ~is_drawn].mean()
        means.append(gap / spread)
    assert abs(np.mean(means)) < 0.15


def test_features_are_weighted_counts():
    windows = np.array([[1, 1, 1, 1, 2], [3, 3, 3, 3, 3], [3, 3, 3, 3, 3]], np.int32)
    features = ngram_features(windows, vocabulary=4)
    assert features.shape == (3, 4 + BIGRAM_BUCKETS) and features.dtype == np.float32
    rare = np.log(4 / 2) / 3
    dense = features[:, :4].toarray()
    np.testing.assert_allclose(dense[0], [0, 2 * rare, rare, 0], rtol=1e-6)
    assert features[0].nnz == 4  # two unigrams, two bigrams


def test_penalties_run_from_strong_to_weak():
    assert list(PENALTIES) == sorted(PENALTIES)


@pytest.mark.parametrize(
    ("target", "pool", "message"),
    [
        (np.zeros((8, 4)), np.zeros((16, 4), np.int32), "integer"),
        (np.zeros((8, 4, 1), np.int32), np.zeros((16, 4), np.int32), "two-dimensional"),
        (np.zeros((7, 4), np.int32), np.zeros((16, 4), np.int32), "at least 8"),
        (np.zeros((8, 4), np.int32), np.zeros((15, 4), np.int32), "at least 16"),
        (np.zeros((8, 4), np.int32), np.zeros((16, 5), np.int32), "gives the class away"),
        (np.full((8, 4), -1), np.zeros((16, 4), np.int32), "no negative id"),
    ],
)
def test_unusable_windows_are_refused(target, pool, message):
    with pytest.raises(WindowError, match=message):
        domain_match_scores(target, pool, seed=0)


def test_without_negatives_there_is_nothing_to_fit(world):
    with pytest.raises(ConfigError, match="train_windows is 0"):
        domain_match_scores(world[0], world[1], train_windows=0, seed=0)


def test_a_missing_library_names_the_extra(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"metagrad-filter\[demo\]"):
        domain_match_scores(world[0], world[1], seed=0)

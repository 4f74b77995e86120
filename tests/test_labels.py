"""Labels: ranks without tails, and a store that only grows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from metagrad_filter.errors import DataError, NonFiniteMetagradient
from metagrad_filter.labels import (
    LabelStore,
    RoundLabels,
    gaussian_ranks,
    split_half_reliability,
)

finite = st.floats(-1e300, 1e300)


def round_labels(seed, count=12, scale=1.0):
    rng = np.random.default_rng(seed)
    return RoundLabels(
        rng.integers(0, 9, (count, 5)).astype(np.int32),
        (scale * rng.normal(size=(2, count))).astype(np.float32),
    )


@given(arrays(np.float64, st.integers(1, 60), elements=finite))
def test_gaussian_ranks_keep_the_order_and_bound_the_tails(scores):
    ranks = gaussian_ranks(scores)
    assert ranks.dtype == np.float32 and ranks.shape == scores.shape
    # Scores compare exactly as their ranks do: order kept, ties and only ties shared.
    np.testing.assert_array_equal(
        np.sign(scores[:, None].astype(np.longdouble) - scores),
        np.sign(ranks[:, None].astype(np.float64) - ranks),
    )
    # The largest of n normal draws is expected below sqrt(2 ln 2n).
    assert np.abs(ranks).max() <= np.sqrt(2 * np.log(2 * len(scores)))


@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(-100, 100), unique=True))
def test_gaussian_ranks_are_symmetric_and_ignore_every_monotone_change(scores):
    np.testing.assert_allclose(gaussian_ranks(-scores), -gaussian_ranks(scores), atol=1e-6)
    np.testing.assert_array_equal(
        gaussian_ranks(scores), gaussian_ranks(scores.argsort().argsort())
    )
    assert abs(gaussian_ranks(scores).mean()) < 1e-5


@given(
    st.lists(st.tuples(st.integers(-4, 4).map(float), st.integers(1, 5)), min_size=1, max_size=30)
)
def test_an_integer_weight_ranks_as_repetitions_do(rows):
    scores = np.array([score for score, _ in rows])
    counts = np.array([count for _, count in rows])
    repeated = gaussian_ranks(np.repeat(scores, counts))
    firsts = np.cumsum(counts) - counts
    np.testing.assert_allclose(gaussian_ranks(scores, counts), repeated[firsts], atol=2e-6)
    np.testing.assert_allclose(
        gaussian_ranks(scores, np.ones(len(scores))), gaussian_ranks(scores), atol=2e-6
    )


def test_gaussian_ranks_of_nothing_and_of_equals():
    assert gaussian_ranks(np.zeros(0)).shape == (0,)
    np.testing.assert_allclose(gaussian_ranks(np.full(7, 3.0)), np.zeros(7), atol=1e-7)


def test_reliability_is_the_rank_correlation_of_the_halves():
    rng = np.random.default_rng(0)
    first = rng.normal(size=4000)
    assert split_half_reliability(np.stack([first, np.exp(first)])) == pytest.approx(1)
    assert split_half_reliability(np.stack([first, -first])) == pytest.approx(-1)
    assert abs(split_half_reliability(rng.normal(size=(2, 4000)))) < 0.06
    noisy = np.stack([first + rng.normal(size=4000), first + rng.normal(size=4000)])
    assert split_half_reliability(noisy) == pytest.approx(0.48, abs=0.06)


def test_halves_that_say_nothing_have_no_reliability():
    constant = np.zeros((2, 50))
    assert split_half_reliability(constant) == 0
    assert split_half_reliability(np.stack([np.arange(50.0), np.ones(50)])) == 0


def test_values_are_ranks_of_the_mean_of_the_halves():
    labels = round_labels(1)
    np.testing.assert_array_equal(
        labels.values.argsort(), labels.halves.mean(axis=0, dtype=np.float64).argsort()
    )


def test_a_stored_round_comes_back(tmp_path):
    store, labels = LabelStore(tmp_path), round_labels(1)
    assert store.rounds() == []
    store.append(3, labels)
    loaded = LabelStore(tmp_path).load(3)
    np.testing.assert_array_equal(loaded.windows, labels.windows)
    np.testing.assert_array_equal(loaded.halves, labels.halves)
    assert loaded.windows.dtype == np.int32 and loaded.halves.dtype == np.float32


def test_a_stored_round_is_plain_arrays(tmp_path):
    LabelStore(tmp_path).append(1, round_labels(1))
    (path,) = (tmp_path / "labels").iterdir()
    with np.load(path, allow_pickle=False) as data:
        kinds = {name: data[name].dtype.kind for name in data}
    assert kinds == {"windows": "i", "halves": "f", "target": "U"}


def test_a_round_is_never_rewritten(tmp_path):
    store = LabelStore(tmp_path)
    store.append(1, round_labels(1))
    before = (tmp_path / "labels" / "round-000001.npz").read_bytes()
    with pytest.raises(DataError, match="round 1 are already stored"):
        store.append(1, round_labels(2))
    assert (tmp_path / "labels" / "round-000001.npz").read_bytes() == before
    assert [p.name for p in (tmp_path / "labels").iterdir()] == ["round-000001.npz"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_a_round_with_a_number_that_is_not_finite_is_not_written(tmp_path, bad, half):
    labels = round_labels(1)
    labels.halves[half, [4, 7]] = bad
    with pytest.raises(NonFiniteMetagradient, match=r"2 labels of round 5.*window 4"):
        LabelStore(tmp_path).append(5, labels)
    assert not list(tmp_path.rglob("*.npz")) and LabelStore(tmp_path).rounds() == []


DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "no end": lambda data: data[:-1],
    "a changed byte": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    "not a zip": lambda data: b"labels",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_a_data_error(tmp_path, kind):
    store = LabelStore(tmp_path)
    store.append(1, round_labels(1))
    path = tmp_path / "labels" / "round-000001.npz"
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(DataError, match=r"round 1 .*round-000001\.npz"):
        store.load(1)
    store.append(2, round_labels(2))
    with pytest.warns(RuntimeWarning, match="round 1"):
        windows = store.pooled(2).windows
    np.testing.assert_array_equal(windows, store.load(2).windows)


def test_labels_of_different_targets_are_never_pooled(tmp_path):
    store = LabelStore(tmp_path)
    for number, target in ((1, "a"), (2, "b"), (3, "a")):
        store.append(number, replace(round_labels(number), target=target))
    windows = store.pooled(3, "a").windows
    expected = np.concatenate([store.load(1).windows, store.load(3).windows])
    np.testing.assert_array_equal(windows, expected)
    with pytest.raises(DataError, match="no readable labels"):
        store.pooled(3, "c")


@pytest.mark.parametrize("count", [1, 2])
def test_a_missing_array_and_a_pickled_one_are_data_errors(tmp_path, count):
    (tmp_path / "labels").mkdir()
    arrays = {"windows": np.zeros((2, 2)), "halves": np.array([{}, {}], object)}
    path = tmp_path / "labels" / "round-000001.npz"
    np.savez(path, **dict(list(arrays.items())[:count]))
    with pytest.raises(DataError, match="round 1"):
        LabelStore(tmp_path).load(1)


def test_a_missing_round_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="round 4"):
        LabelStore(tmp_path).load(4)


def test_other_files_are_no_rounds(tmp_path):
    store = LabelStore(tmp_path)
    store.append(2, round_labels(1))
    for name in (".tmp-1-ab", "round-2.npz", "round-000003.npz.part", "notes.txt"):
        (tmp_path / "labels" / name).write_bytes(b"")
    assert store.rounds() == [2]


def test_rounds_are_pooled_on_one_scale_in_their_order(tmp_path):
    store = LabelStore(tmp_path)
    rounds = {number: round_labels(number, scale=10.0**number) for number in (10, 2, 9)}
    for number, labels in rounds.items():
        store.append(number, labels)
    assert store.rounds() == [2, 9, 10]
    windows, values, weights = store.pooled(2)
    assert (weights == 1).all()
    np.testing.assert_array_equal(windows, np.concatenate([rounds[9].windows, rounds[10].windows]))
    np.testing.assert_array_equal(values, np.concatenate([rounds[9].values, rounds[10].values]))
    assert len(store.pooled(99)[1]) == 36
    # A round a thousand times larger than another does not outweigh it.
    assert np.sort(values[:12]) == pytest.approx(np.sort(values[12:]))


def test_older_rounds_weigh_less_and_the_age_counts_rounds_of_the_target_only(tmp_path):
    store = LabelStore(tmp_path)
    for number, (target, count) in enumerate([("a", 3), ("a", 4), ("b", 5), ("a", 2)], start=1):
        store.append(number, replace(round_labels(number, count), target=target))
    pooled = store.pooled(3, "a", decay=0.5)
    assert [len(x) for x in pooled] == [9, 9, 9]
    np.testing.assert_array_equal(pooled.weights, np.repeat([0.25, 0.5, 1.0], [3, 4, 2]))
    assert pooled.weights.dtype == np.float32
    np.testing.assert_array_equal(store.pooled(1, "a", decay=0.5).weights, [1, 1])


def test_norms_are_stored_beside_the_scores_they_divided(tmp_path):
    store, labels = LabelStore(tmp_path), round_labels(1)
    store.append(1, replace(labels, norms=np.arange(1.0, 13.0, dtype=np.float32)))
    np.testing.assert_array_equal(store.load(1).norms, np.arange(1.0, 13.0))
    store.append(2, labels)
    assert store.load(2).norms is None

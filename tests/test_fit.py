"""Distillation: what a scorer recovers from labels, and what it must not be misled by."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.scorer import fit
from metagrad_filter.scorer.features import ngram_rows
from metagrad_filter.scorer.fit import distinct_windows, fit_scorer, held_out, merge_windows
from metagrad_filter.statistics import rank_correlation

VOCAB, LENGTH = 40, 16


def tokens(count, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, (count, LENGTH)).astype(np.int32)


def worth(windows):
    """A window's true score: a sum of weights of its unigrams and bigrams."""
    rng = np.random.default_rng(99)
    unigrams, bigrams = rng.normal(size=VOCAB), rng.normal(size=(VOCAB, VOCAB)) / 2
    pairs = bigrams[windows[:, :-1], windows[:, 1:]].sum(axis=1)
    return unigrams[windows].sum(axis=1) + pairs


@pytest.fixture(scope="module")
def world():
    """Windows, noisy labels, and the scorer of their clean fit."""
    windows = tokens(4000, 1)
    true = worth(windows)
    noise = np.random.default_rng(2).normal(size=4000) * true.std() / 2
    labels = true + noise
    scorer = fit_scorer(windows, labels, vocab_size=VOCAB)
    return windows, labels, scorer


FRESH = tokens(1500, 3)


def agreement(scorer):
    return rank_correlation(scorer.score(FRESH), worth(FRESH))


def test_a_sum_of_ngram_weights_is_recovered_from_noisy_labels(world):
    _, _, scorer = world
    assert agreement(scorer) > 0.8
    assert set(scorer.metadata) == {
        "form", "preset", "ridge", "labels", "rank_correlation", "quantization", "reference",
        "reference_windows",
    }  # fmt: skip
    assert scorer.table.shape == (2**20, 1) and scorer.table.dtype == np.int8
    assert scorer.metadata["form"] == "linear" and scorer.metadata["labels"] == 4000
    # Judged by noisy labels it cannot have seen: lower than by the truth, but not by luck.
    assert 0.5 < scorer.metadata["rank_correlation"] < agreement(scorer)


@pytest.mark.parametrize(("share", "drop"), [(0.002, 0.01), (0.01, 0.04)])
def test_monstrous_labels_hardly_change_the_ranking(world, share, drop):
    windows, labels, clean = world
    labels = labels.copy()
    hit = np.random.default_rng(4).choice(len(labels), int(share * len(labels)), replace=False)
    labels[hit] = np.random.default_rng(5).choice([-1e6, 1e6], len(hit)) * np.abs(labels[hit])
    scorer = fit_scorer(windows, labels, vocab_size=VOCAB)
    assert agreement(scorer) > agreement(clean) - drop


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_the_same_seed_gives_the_same_scorer(world, seed):
    windows, labels, _ = world
    fits = [fit_scorer(windows[:300], labels[:300], vocab_size=VOCAB, seed=seed) for _ in range(2)]
    assert fits[0].metadata == fits[1].metadata
    for name, tensor in fits[0].tensors().items():
        np.testing.assert_array_equal(tensor, fits[1].tensors()[name])


def test_equal_labels_give_a_scorer_that_ranks_nothing():
    scorer = fit_scorer(tokens(200, 1), np.full(200, 3.0), vocab_size=VOCAB)
    assert np.ptp(scorer.score(FRESH)) < 1e-4
    assert scorer.metadata["rank_correlation"] == 0


def test_padding_carries_no_weight():
    windows = tokens(600, 1)
    labels = np.isin(windows, [3]).sum(axis=1).astype(float)
    windows[:, -5:] = -1
    scorer = fit_scorer(windows, labels, vocab_size=VOCAB, pad_id=-1)
    assert scorer.pad_id == -1
    longer = np.concatenate([windows, np.full((600, 4), -1, np.int32)], axis=1)
    np.testing.assert_allclose(scorer.score(longer), scorer.score(windows), rtol=1e-6)


# The embedding bag has to earn its place.


def exclusive_or(count, seed):
    """Labels that no sum over n-grams explains: one of two topics, but not both."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(4, VOCAB, (count, LENGTH))
    present = rng.integers(0, 2, (count, 2)).astype(bool)
    # Three tokens of each topic, never side by side, so that bigrams tell nothing either.
    for topic, columns in ((0, [0, 4, 8]), (1, [2, 6, 10])):
        windows[:, columns] = np.where(present[:, topic, None], topic, windows[:, columns])
    return windows.astype(np.int32), (present[:, 0] ^ present[:, 1]).astype(float)


def test_a_bag_is_kept_where_only_an_interaction_explains_the_labels():
    windows, labels = exclusive_or(4000, 1)
    unseen, truth = exclusive_or(1000, 2)
    found = {}
    for preset in ("linear", "small"):
        scorer = fit_scorer(windows, labels, vocab_size=VOCAB, preset=preset)
        found[preset] = rank_correlation(scorer.score(unseen), truth)
        quantization = scorer.metadata["quantization"]
        assert quantization["rank_correlation_with_float32"] >= 0.999
    assert scorer.metadata["form"] == "linear+bag" and scorer.metadata["preset"] == "small"
    assert scorer.table.shape == (2**16, 32) and scorer.table.dtype == np.int8
    assert found["linear"] < 0.15
    assert found["small"] > found["linear"] + 0.2


def test_a_bag_is_only_kept_for_a_better_choice(world, monkeypatch):
    # Whatever the bag does, the kept form ranks the choosing windows at least as well.
    windows, labels, _ = world
    rng = np.random.default_rng(6)
    for noise in (labels[:800], rng.normal(size=800)):
        tried = []

        def spy(*arguments, tried=tried, original=fit._fit_bag):
            found = original(*arguments)
            tried.append((found, *arguments))
            return found

        monkeypatch.setattr(fit, "_fit_bag", spy)
        scorer = fit_scorer(windows[:800], noise, vocab_size=VOCAB, preset="small")
        monkeypatch.undo()
        ((bag, _, _, all_windows, targets, _, _, choose, linear, _, _),) = tried
        assert scorer.metadata["form"] == ("linear" if bag is None else "linear+bag")
        assert scorer.table.shape == (2**16, 1 if bag is None else 32)
        if bag is not None:
            chosen = rank_correlation(bag.score(all_windows[choose]), targets[choose])
            assert chosen > linear


def test_padding_of_a_bag_carries_no_weight():
    windows, labels = exclusive_or(2000, 1)
    scorer = fit_scorer(windows, labels, vocab_size=VOCAB, pad_id=-1, preset="small")
    assert scorer.metadata["form"] == "linear+bag"
    longer = np.concatenate([windows, np.full((2000, 4), -1, np.int32)], axis=1)
    np.testing.assert_array_equal(scorer.score(longer), scorer.score(windows))


# Rounding, and what is stored about the scores.


def test_rounding_the_table_hardly_changes_the_ranking(world):
    windows, labels, scorer = world
    scorers = {"int8": scorer}
    for dtype in ("float16", "float32"):
        scorers[dtype] = fit_scorer(windows, labels, vocab_size=VOCAB, dtype=dtype)
    for dtype, rounded in scorers.items():
        assert rounded.table.dtype == dtype
        measured = rounded.metadata["quantization"]
        assert measured["dtype"] == dtype
        exact = rank_correlation(rounded.score(FRESH), scorers["float32"].score(FRESH))
        assert min(exact, measured["rank_correlation_with_float32"]) >= 0.999
    assert scorers["float32"].metadata["rank_correlation"] == measured["rank_correlation_float32"]


def test_weights_with_heavy_tails_are_clipped_where_that_ranks_better():
    rng = np.random.default_rng(0)
    table = rng.standard_t(3.0, size=(2**14, 1)).astype(np.float32)
    # A few rows that windows hardly ever read must not cost the others their steps.
    table[:4] = 1e3
    frequencies = np.full(2**14, 1000)
    frequencies[:4] = 1
    exact = mgf.Scorer(50_000, 3, table)
    windows = rng.integers(0, 50_000, (1000, 64)).astype(np.int32)
    rows = ngram_rows(windows, bits=14, hash_seed=3)
    windows = windows[~(rows < 4).any(axis=1)]
    scores = {
        name: scorer.score(windows)
        for name, scorer in {
            "exact": exact,
            "clipped": exact.quantized("int8", frequencies=frequencies),
            "plain": replace(
                exact,
                table=np.rint(table / (1e3 / 127)).astype(np.int8),
                scale=np.full(1, 1e3 / 127, np.float32),
            ),
        }.items()
    }
    assert rank_correlation(scores["clipped"], scores["exact"]) > 0.995
    assert rank_correlation(scores["plain"], scores["exact"]) < 0.8


def test_the_reference_holds_the_quantiles_of_scores_of_windows_that_were_not_fitted(world):
    windows, _, scorer = world
    reference = scorer.metadata["reference"]
    assert len(reference) == 257 and all(type(q) is float for q in reference)
    distinct = fit.distinct_windows(windows, np.zeros(len(windows)))[0]
    scores = scorer.score(distinct[fit.held_out(len(distinct), 0)])
    assert scorer.metadata["reference_windows"] == len(scores)
    assert (reference[0], reference[256]) == (scores.min(), scores.max())
    shares = [(scores <= reference[level]).mean() for level in (64, 128, 192)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75], atol=0.02)
    assert [float(np.float32(q)) for q in reference] == reference


def test_the_reference_may_be_of_other_windows_and_is_of_4096_at_most(world):
    windows, _, scorer = world
    many = np.tile(windows, (6, 1))[:10_001]
    found = fit.reference_of(scorer, many)
    assert found["reference_windows"] == 3334
    assert found["reference"][256] == scorer.score(many[::3]).max()
    assert fit.reference_of(scorer, many[:4096])["reference_windows"] == 4096
    few = windows[:200]
    labels = np.arange(200.0)
    fitted = fit.fit_scorer(few, labels, vocab_size=scorer.vocab_size, reference=windows[-77:])
    assert fitted.metadata["reference_windows"] == 77
    assert fitted.metadata["reference"][0] == fitted.score(windows[-77:]).min()


# Windows that judge are not windows that are fitted.


@given(st.integers(50, 400), st.integers(0, 2**32))
def test_held_out_positions_are_a_tenth_and_depend_on_the_seed_alone(count, seed):
    positions = held_out(count, seed)
    assert len(positions) == len(set(positions)) == count // 10
    assert positions.min() >= 0 and positions.max() < count
    np.testing.assert_array_equal(positions, held_out(count, seed))


def test_held_out_labels_have_no_influence_on_the_scorer(world):
    windows, labels, _ = world
    windows, labels = windows[:500], labels[:500]
    assert len(distinct_windows(windows, labels)[0]) == 500
    changed = labels.copy()
    test = held_out(500, 0)
    # Permuted among themselves, so that the ranks of all others stay.
    changed[test] = labels[test][::-1]
    fits = [fit_scorer(windows, y, vocab_size=VOCAB) for y in (labels, changed)]
    np.testing.assert_array_equal(fits[0].table, fits[1].table)
    assert fits[0].metadata["rank_correlation"] != fits[1].metadata["rank_correlation"]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(-5, 5)), min_size=1))
def test_repeated_windows_are_merged_into_their_mean(rows):
    windows = np.array([[a, b] for a, b, _ in rows], np.int32)
    values = np.array([value for *_, value in rows], np.float64)
    found, means = distinct_windows(windows, values)
    expected: dict[tuple[int, int], list[float]] = {}
    for a, b, value in rows:
        expected.setdefault((a, b), []).append(value)
    assert [tuple(w) for w in found.tolist()] == list(expected)
    np.testing.assert_allclose(means, [np.mean(v) for v in expected.values()], rtol=1e-6)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 5), st.integers(1, 4)), min_size=1),
)
def test_weights_merge_as_repetitions_do(rows):
    windows = np.array([[a] for a, *_ in rows], np.int32)
    values = np.array([value for _, value, _ in rows], np.float64)
    counts = np.array([count for *_, count in rows])
    found = merge_windows(windows, values, counts)
    repeated = merge_windows(
        np.repeat(windows, counts, axis=0), np.repeat(values, counts), np.ones(counts.sum())
    )
    for one, other in zip(found, repeated):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_an_integer_weight_fits_as_repetitions_do(seed):
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, VOCAB, (60, 6)).astype(np.int32)
    labels, counts = rng.normal(size=60), rng.integers(1, 4, 60)
    weighted = fit_scorer(windows, labels, vocab_size=VOCAB, weights=counts, dtype="float32")
    repeated = fit_scorer(
        np.repeat(windows, counts, axis=0),
        np.repeat(labels, counts),
        vocab_size=VOCAB,
        dtype="float32",
    )
    plain = fit_scorer(windows, labels, vocab_size=VOCAB, dtype="float32")
    scores = [scorer.score(windows) for scorer in (weighted, repeated, plain)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-4)
    assert np.abs(scores[0] - scores[2]).max() > 10 * np.abs(scores[0] - scores[1]).max()


@pytest.mark.parametrize("bad", [np.ones(499), np.zeros(500), np.full(500, np.nan)])
def test_weights_that_cannot_be_used_are_refused(world, bad):
    windows, labels, _ = world
    with pytest.raises(WindowError, match="expected 500 positive"):
        fit_scorer(windows[:500], labels[:500], vocab_size=VOCAB, weights=bad)


def test_a_window_labelled_twice_cannot_be_fitted_and_judged(world):
    windows, labels, _ = world
    twice = np.concatenate([windows[:400], windows[:400]])
    repeated = fit_scorer(twice, np.concatenate([labels[:400]] * 2), vocab_size=VOCAB)
    twofold = np.full(400, 2.0)
    once = fit_scorer(windows[:400], labels[:400], vocab_size=VOCAB, weights=twofold)
    np.testing.assert_allclose(repeated.score(FRESH), once.score(FRESH), atol=1e-2)
    # A leak would show as a correlation near one.
    assert repeated.metadata["rank_correlation"] == pytest.approx(
        once.metadata["rank_correlation"], abs=0.02
    )


ERRORS = {
    "another kind": ({"kind": "image"}, ConfigError, "'image'"),
    "no vocabulary": ({"vocab_size": None}, ConfigError, "vocab_size is missing"),
    "an id too large": ({"vocab_size": 39}, WindowError, "id 39"),
    "floats": ({"windows": tokens(100, 1) / 2}, WindowError, "float64"),
    "one window": ({"windows": tokens(100, 1)[0]}, WindowError, r"\(16,\)"),
    "labels' length": ({"labels": np.ones(99)}, WindowError, r"\(99,\).*100"),
    "labels' axes": ({"labels": np.ones((100, 1))}, WindowError, r"\(100, 1\)"),
    "a label NaN": ({"labels": np.r_[np.nan, np.ones(99)]}, WindowError, "1 non-finite"),
    "too few": ({"windows": tokens(49, 1), "labels": np.ones(49)}, WindowError, "49 distinct"),
    "copies": ({"windows": np.ones((100, 4), np.int32)}, WindowError, "1 distinct"),
    "preset": ({"preset": "huge"}, ConfigError, "'huge'"),
    "dtype": ({"dtype": "int4"}, ConfigError, "'int4'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_value(case):
    changes, error, message = ERRORS[case]
    arguments = {"windows": tokens(100, 1), "labels": np.arange(100.0), "vocab_size": VOCAB}
    with pytest.raises(error, match=message):
        fit_scorer(**(arguments | changes))


def test_a_published_fit_scores_in_an_interpreter_that_cannot_import_jax(world, tmp_path):
    windows, labels = exclusive_or(1500, 1)
    deep = fit_scorer(windows, labels, vocab_size=VOCAB, preset="small")
    registry = mgf.Registry(tmp_path)
    scorers = [world[2], replace(deep, strength=2.0)]
    versions = [registry.publish(scorer) for scorer in scorers]
    np.save(tmp_path / "windows.npy", FRESH)
    program = """
import sys
class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax"):
            raise ImportError(f"{name} is banned here")
sys.meta_path.insert(0, Ban())
import numpy as np
import metagrad_filter as mgf
folder, *versions = sys.argv[1:]
windows = np.load(folder + "/windows.npy", allow_pickle=False)
for version in versions:
    scores = mgf.Registry(folder).load(int(version)).score(windows)
    np.save(f"{folder}/scores-{version}.npy", scores)
"""
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *map(str, versions)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for version, scorer in zip(versions, scorers):
        found = np.load(tmp_path / f"scores-{version}.npy")
        np.testing.assert_array_equal(found, scorer.score(FRESH))

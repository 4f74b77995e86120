"""Checks of metagradients against worlds in which the right answer is known.

The model of most tests is a point that is pulled towards the windows it trains on, and the outer
metric its distance from a goal: what a subset or a tilt does can be written down.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, WindowError
from metagrad_filter.metagradient import probe_scores
from metagrad_filter.metagradient.checks import (
    SubsetRetrainings,
    compare_with_autodiff,
    linear_datamodeling_score,
    retrain_on_subsets,
    spearman_brown,
    split_half_reliability,
    tilt_check,
)

RATE, WIDTH = 0.1, 4
SGD = optax.sgd(RATE)
GOAL = np.array([1.0, -1.0, 0.5, 0.0], np.float32)
START = jnp.zeros(WIDTH)


def pull(params, batch):
    return 0.5 * jnp.sum((params - batch) ** 2, axis=-1)


def distance(params):
    return 0.5 * jnp.sum((params - GOAL) ** 2)


def points(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def true_scores(pool):
    """To first order a window's score is its gradient's product with the gradient of Phi."""
    return probe_scores(pull, START, -jax.grad(distance)(START), pool)


def retrained(pool, **changes):
    arguments = {"optimizer": SGD, "steps": 4, "batch_windows": 8, "subsets": 24, "seeds": 2}
    return retrain_on_subsets(
        pull, distance, START, SGD.init(START), pool, **{**arguments, **changes}
    )


# ---- reliability


@given(st.floats(1e-3, 1), st.floats(1, 50))
def test_spearman_brown_grows_with_evidence(correlation, factor):
    whole = spearman_brown(correlation, factor=factor)
    assert correlation - 1e-12 <= whole <= 1 + 1e-12
    assert spearman_brown(whole, factor=1 / factor) == pytest.approx(correlation)


@given(st.floats(-1, 0))
def test_spearman_brown_leaves_disagreement_alone(correlation):
    assert spearman_brown(correlation) == correlation


def test_whole_reliability_is_that_of_twice_the_evidence():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=4000)
    parts = [truth + rng.normal(size=4000) for _ in range(4)]
    single = split_half_reliability(parts[0], parts[1])
    double = split_half_reliability(parts[0] + parts[1], parts[2] + parts[3])
    assert single.half == pytest.approx(0.5, abs=0.05)
    assert single.whole == pytest.approx(double.half, abs=0.04)


def test_a_constant_half_is_not_reliable():
    assert split_half_reliability(np.ones(5), np.arange(5)).whole == 0


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ([1, 2, 3], [1, 2], ConfigError, r"shapes \(3,\) and \(2,\)"),
        ([1, 2], [1, 2], ConfigError, "at least three scores"),
        ([1, 2, math.nan], [1, 2, 3], NonFiniteMetagradient, "1 of 6 scores"),
    ],
)
def test_split_half_reliability_refuses(first, second, error, message):
    with pytest.raises(error, match=message):
        split_half_reliability(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.5,), "correlation=1.5"), ((math.nan,), "correlation=nan")],
)
def test_spearman_brown_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        spearman_brown(*arguments)
    with pytest.raises(ConfigError, match="factor=0"):
        spearman_brown(0.5, factor=0)


# ---- linear datamodeling score


def test_retraining_does_what_gradient_descent_on_the_half_does():
    pool, steps = points(16), 5
    # The batch is the whole half, so every order is the same descent towards the half's mean.
    found = retrained(pool, steps=steps, batch_windows=8, subsets=6)
    kept = (1 - RATE) ** steps
    for inside, phi in zip(found.members, found.phi):
        end = (1 - kept) * pool[inside].mean(axis=0)
        np.testing.assert_allclose(phi, 0.5 * np.sum((end - GOAL) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    "strata", [None, np.arange(21) % 3, np.array([0] * 6 + [1] * 5 + [2] * 10)]
)
def test_subsets_are_halves_of_every_stratum(strata):
    members = retrained(points(21), strata=strata, steps=1, batch_windows=2, subsets=8).members
    assert members.shape == (8, 21) and len({*map(bytes, members)}) == 8
    assert {*members.sum(axis=1)} == {10}
    for label in () if strata is None else np.unique(strata):
        inside = members[:, strata == label].sum(axis=1)
        assert np.all(np.abs(inside - np.sum(strata == label) / 2) <= 0.5)


def test_right_scores_predict_retraining_and_others_do_not():
    pool = points(64)
    scores = true_scores(pool)
    truth = retrained(pool, subsets=64, steps=8, seeds=4)
    right, wrong = truth.agreement(scores), truth.agreement(-scores)
    chance = truth.agreement(np.random.default_rng(1).normal(size=64))
    assert right.rho > 0.8 and right.low > 0.6
    assert wrong.rho == pytest.approx(-right.rho)
    assert abs(chance.rho) < 0.4 and chance.low < 0 < chance.high
    assert right.low < right.rho < right.high
    assert right.reliability > 0.8
    assert right.ceiling == pytest.approx(math.sqrt(right.reliability))
    np.testing.assert_allclose(right.predicted, truth.members @ scores.astype(np.float64))
    np.testing.assert_allclose(right.measured, -truth.phi.mean(axis=1))


def test_one_call_gives_what_the_two_give():
    pool = points(32)
    scores = true_scores(pool)
    options: dict[str, Any] = {"steps": 4, "batch_windows": 8, "subsets": 12, "seeds": 2, "seed": 3}
    found = linear_datamodeling_score(
        pull, distance, START, SGD.init(START), pool, scores, optimizer=SGD, **options
    )
    expected = retrained(pool, **options).agreement(scores, seed=3)
    assert (found.rho, found.low, found.high) == (expected.rho, expected.low, expected.high)


def test_runs_side_by_side_give_the_same():
    pool = points(32)
    np.testing.assert_allclose(
        retrained(pool, parallel=4, subsets=5).phi, retrained(pool, subsets=5).phi, rtol=1e-5
    )


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    pool, noise = rng.normal(size=200), rng.normal(size=200)
    members = rng.random((96, 200)) < 0.5
    truth = SubsetRetrainings(members, -(members @ pool)[:, None] + rng.normal(size=(96, 2)))
    same = truth.difference(pool, pool)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = truth.difference(pool, noise)
    assert better.low > 0.3 and better.low < better.value < better.high
    # Two scores that err alike are told apart by far less than either one's own interval.
    close = truth.difference(pool, pool + 0.3 * noise)
    alone = truth.agreement(pool + 0.3 * noise)
    assert close.high - close.low < alone.high - alone.low


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_reliability_of_retrainings_is_that_of_their_mean(seeds):
    rng = np.random.default_rng(seeds)
    truth = rng.normal(size=(4000, 1))
    phi = truth + rng.normal(size=(4000, seeds))
    found = SubsetRetrainings(np.ones((4000, 1), bool), phi).reliability
    # The signal's share of the variance of a mean over seeds.
    assert found == pytest.approx(seeds / (seeds + 1), abs=0.05)


def test_reliability_of_one_seed_is_unknown():
    found = SubsetRetrainings(np.eye(4, dtype=bool), np.arange(4.0)[:, None])
    assert math.isnan(found.reliability)
    assert math.isnan(found.agreement(np.arange(4)).ceiling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_windows": 2.5}, "batch_windows=2.5"),
        ({"seeds": True}, "seeds=True"),
        ({"subsets": 2}, "subsets=2; expected an integer >= 3"),
        ({"parallel": 0}, "parallel=0"),
        ({"strata": np.zeros(3)}, r"strata have shape \(3,\); expected \(8,\)"),
    ],
)
def test_retrain_on_subsets_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        retrained(points(8), **changes)


def test_retrain_on_subsets_refuses_other_metrics_and_pools():
    with pytest.raises(WindowError, match=r"leading sizes \[3, 4\]"):
        retrained({"a": np.zeros((3, 2)), "b": np.zeros((4, 2))})
    with pytest.raises(ConfigError, match="one outer metric"):
        retrain_on_subsets(
            pull,
            {"a": distance},  # pyright: ignore[reportArgumentType]
            START,
            SGD.init(START),
            points(8),
            optimizer=SGD,
            steps=1,
            batch_windows=2,
        )


def test_a_retraining_that_diverges_is_named():
    wild = optax.sgd(1e30)
    with pytest.raises(NonFiniteMetagradient, match=r"retrainings ended.*lower the learning rate"):
        retrained(points(8), optimizer=wild, batch_windows=2)


@pytest.mark.parametrize(
    ("scores", "options", "error", "message"),
    [
        (np.zeros(3), {}, ConfigError, r"scores have shape \(3,\); expected \(4,\)"),
        ([0, 1, math.inf, 0], {}, NonFiniteMetagradient, "the first for window 2"),
        (np.arange(4), {"confidence": 1.0}, ConfigError, "confidence=1.0"),
        (np.arange(4), {"draws": 0}, ConfigError, "draws=0"),
    ],
)
def test_agreement_refuses(scores, options, error, message):
    truth = SubsetRetrainings(np.eye(4, dtype=bool), np.arange(8.0).reshape(4, 2))
    with pytest.raises(error, match=message):
        truth.agreement(scores, **options)


def test_linear_datamodeling_score_refuses_before_it_trains():
    def untrainable(params, batch):
        raise AssertionError("trained although the scores do not fit")

    with pytest.raises(ConfigError, match=r"scores have shape \(3,\); expected \(8,\)"):
        linear_datamodeling_score(
            untrainable,
            distance,
            START,
            SGD.init(START),
            points(8),
            np.zeros(3),
            optimizer=SGD,
            steps=1,
            batch_windows=2,
        )


def test_retrainings_that_do_not_belong_together_are_refused():
    with pytest.raises(ConfigError, match=r"members \(3, 4\) and phi \(2, 1\)"):
        SubsetRetrainings(np.ones((3, 4), bool), np.ones((2, 1)))


# ---- tilts


def classes_world():
    """Windows near the goal, near the start and opposite to the goal, in unequal numbers."""
    classes = np.repeat(["at goal", "opposite", "start"], [20, 12, 28])
    centres = {"at goal": GOAL, "opposite": -GOAL, "start": 0 * GOAL}
    pool = np.stack([centres[c] for c in classes]) + 0.1 * points(60)
    return pool.astype(np.float32), classes


def tilted(pool, classes, scores, **changes):
    arguments = {"optimizer": SGD, "steps": 6, "batch_windows": 10}
    return tilt_check(
        pull, distance, START, SGD.init(START), pool, classes, scores, **{**arguments, **changes}
    )


def test_tilts_follow_right_scores_and_contradict_reversed_ones():
    pool, classes = classes_world()
    scores = true_scores(pool)
    found = tilted(pool, classes, scores)
    assert found.classes.tolist() == ["at goal", "opposite", "start"]
    assert found.shares.tolist() == pytest.approx([1 / 3, 0.2, 28 / 60])
    assert found.effect[0] > found.effect[2] > found.effect[1]
    assert found.effect[0] > 0 > found.effect[1]
    assert found.rank_correlation == pytest.approx(1) and found.sign_agreement == 1
    assert np.all(found.standard_error < np.abs(found.effect))
    back = tilted(pool, classes, -scores)
    assert back.rank_correlation == pytest.approx(-1) and back.sign_agreement == 0


def test_a_tilt_is_the_derivative_by_share_of_the_class():
    pool, classes = classes_world()
    noiseless = np.stack([pool[classes == c].mean(axis=0) for c in classes])
    # One step on the whole mixture: Phi moves along its gradient by the change of the mean.
    small = optax.sgd(1e-3)
    found = tilted(
        noiseless, classes, true_scores(pool), optimizer=small, steps=1, batch_windows=600
    )
    means = np.stack([noiseless[classes == c][0] for c in found.classes])
    others = [noiseless[classes != c].mean(axis=0) for c in found.classes]
    expected = 1e-3 * (means - others) @ GOAL
    np.testing.assert_allclose(found.effect, expected, rtol=0.02, atol=1e-5)


def test_one_seed_has_no_standard_error():
    pool, classes = classes_world()
    assert np.isnan(tilted(pool, classes, true_scores(pool), seeds=1).standard_error).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tilt": 0.0}, ConfigError, "tilt=0.0"),
        ({"tilt": 1.0}, ConfigError, "tilt=1.0"),
        ({"seeds": 0}, ConfigError, "seeds=0"),
        ({"classes": np.zeros(60)}, ConfigError, "the only class is"),
        ({"classes": np.arange(3)}, ConfigError, r"classes have shape \(3,\)"),
        ({"scores": np.full(60, math.nan)}, NonFiniteMetagradient, "60 of 60 scores"),
    ],
)
def test_tilt_check_refuses(changes, error, message):
    pool, classes = classes_world()
    classes = changes.pop("classes", classes)
    scores = changes.pop("scores", np.zeros(60))
    with pytest.raises(error, match=message):
        tilted(pool, classes, scores, **changes)


# ---- autodiff


def gather_loss(params, batch):
    return (params["table"][batch].sum(axis=1) - 1.0) ** 2


def gather_outer(params):
    return jnp.sum((params["table"] - 0.5) ** 2)


def test_the_adjoint_is_the_derivative_of_the_loop_even_where_moments_are_zero():
    # Rows 6 and 7 are in no window: their second moment stays zero, where autodiff alone is NaN.
    params = {"table": jnp.linspace(-1.0, 1.0, 8)}
    batches = np.random.default_rng(0).integers(0, 6, (5, 4, 3))
    optimizer = optax.adamw(0.02, weight_decay=0.1)
    found = compare_with_autodiff(
        gather_loss, gather_outer, params, optimizer.init(params), batches, optimizer=optimizer
    )
    assert found.adjoint.shape == found.autodiff.shape == (5, 4)
    assert np.abs(found.autodiff).max() > 0
    assert found.relative_error < 1e-4


@jax.custom_jvp
def _lopsided(p):
    return jnp.sum(p**2)


@_lopsided.defjvp
def _lopsided_jvp(primals, tangents):
    (p,), (t,) = primals, tangents
    # A field that is no gradient: its Jacobian, the "Hessian", is not symmetric.
    field = jnp.array([[1.0, 2.0], [-2.0, 1.0]]) @ p
    return _lopsided(p), jnp.vdot(field, t)


def test_comparison_exposes_a_loss_whose_derivative_is_none():
    def loss(params, batch):
        return _lopsided(params) * batch

    params, batches = jnp.array([1.0, 0.5]), jnp.ones((6, 2))
    found = compare_with_autodiff(
        loss, lambda p: jnp.sum(p), params, SGD.init(params), batches, optimizer=SGD
    )
    assert found.relative_error > 0.1


def test_comparison_refuses_several_metrics():
    with pytest.raises(ConfigError, match="one outer metric"):
        compare_with_autodiff(
            pull,
            {"a": distance},  # pyright: ignore[reportArgumentType]
            START,
            SGD.init(START),
            points(8)[None],
            optimizer=SGD,
        )

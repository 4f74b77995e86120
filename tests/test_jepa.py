"""The latent predictor: its moving target, its collapse, and exact metagradients through both."""

import functools
import pickle
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.metagradient.diagnostics.autodiff import compare_with_autodiff
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy import EmaOptimizer, JepaConfig, JepaLoss, SeriesConfig, init_jepa
from metagrad_filter.series_targets import LatentGeometry

ENCODER = SeriesConfig(channels=2, patch=2, max_patches=4, width=8, layers=1, heads=2)
CONFIG = JepaConfig(ENCODER, hidden=8)


def series(count, seed):
    """Noisy waves of two channels, some values missing."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6.3, (count, 1, 2)), rng.uniform(0.3, 1.5, (count, 1, 1))
    found = np.sin(speed * np.arange(8)[:, None] + phase) + rng.normal(size=(count, 8, 2)) / 10
    found[rng.random(found.shape) < 0.05] = np.nan
    return found.astype(np.float32)


ANCHORS = series(16, 1)
LOSS = JepaLoss(CONFIG, ANCHORS)
FACTORY = EmaOptimizer(functools.partial(optax.adamw, b2=0.95), 0.9)


@functools.cache
def trained(loss=LOSS, steps=150, rate=1e-2):
    optimizer, start = FACTORY(rate), init_jepa(loss.config)
    batches = series(steps * 16, 2).reshape(steps, 16, 8, 2)
    params, state, _ = jax.jit(functools.partial(run, loss, optimizer))(
        start, optimizer.init(start), batches, jnp.ones((steps, 16))
    )
    return params, state


def test_the_target_encoder_is_a_moving_average_of_the_encoder():
    params = init_jepa(CONFIG)
    params["target"] = jax.tree.map(lambda x: x + 0.5, params["encoder"])
    optimizer = FACTORY(0.1)
    state = optimizer.init(params)
    # A gradient of the target encoder, however large, moves nothing.
    gradient = jax.tree.map(jnp.ones_like, params)
    loud = gradient | {"target": jax.tree.map(lambda x: x * 1e9, gradient["target"])}
    updates: Any = optimizer.update(loud, state, params)[0]
    after: Any = optax.apply_updates(params, updates)
    expected = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, params["target"], after["encoder"]
    )
    for found, wanted in zip(jax.tree.leaves(after["target"]), jax.tree.leaves(expected)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    quiet, _ = optimizer.update(gradient, state, params)
    for a, b in zip(jax.tree.leaves(quiet), jax.tree.leaves(updates)):
        np.testing.assert_array_equal(a, b)
    inner = optax.adamw(0.1, b2=0.95)
    rest = {name: params[name] for name in ("encoder", "predictor")}
    plain, _ = inner.update({name: gradient[name] for name in rest}, inner.init(rest), rest)
    for a, b in zip(jax.tree.leaves({n: updates[n] for n in rest}), jax.tree.leaves(plain)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_metagradients_see_what_the_moving_target_does_to_later_steps():
    params, state = trained()
    batches = series(4 * 5, 3).reshape(4, 5, 8, 2)
    probe = series(6, 4)
    found = compare_with_autodiff(
        LOSS,
        lambda p: LOSS.prediction_errors(p, jnp.asarray(probe)).mean(),
        params,
        state,
        batches,
        optimizer=FACTORY(1e-2),
    )
    assert found.relative_error < 2e-3


def rank_of(params, loss):
    geometry = LatentGeometry(series(64, 5), gate_share=0.5)
    return float(np.exp(-geometry.outer(loss)(params)))


def test_the_anchors_keep_states_from_collapsing():
    bare = JepaLoss(JepaConfig(ENCODER, hidden=8, variance=0.0, covariance=0.0), ANCHORS)
    kept, lost = trained()[0], trained(bare)[0]
    spread = [
        np.asarray(loss.hidden(p, series(64, 5))).reshape(-1, 8).std(axis=0).mean()
        for loss, p in ((LOSS, kept), (bare, lost))
    ]
    assert spread[0] > 0.5 and spread[0] > 2 * spread[1]
    assert rank_of(kept, LOSS) > 3
    # And prediction is learned, not only spread.
    windows = series(64, 5)
    shuffled = np.random.default_rng(0).permuted(windows, axis=1)
    errors = [float(LOSS.prediction_errors(kept, w).mean()) for w in (windows, shuffled)]
    assert errors[0] < 0.9 * errors[1]


def test_the_loss_of_a_window_is_its_own():
    params, windows = trained()[0], series(6, 6)
    losses = np.asarray(LOSS(params, windows))
    np.testing.assert_allclose(LOSS(params, windows[3:4]), losses[3:4], rtol=1e-4)
    errors = np.asarray(LOSS.prediction_errors(params, windows))
    np.testing.assert_allclose(losses - errors, float(LOSS.collapse(params)), rtol=1e-4)
    empty = np.full((1, 8, 2), np.nan, np.float32)
    assert float(LOSS.prediction_errors(params, empty)[0]) == 0


def test_equal_anchors_are_equal_and_travel():
    again = pickle.loads(pickle.dumps(LOSS))
    assert again == LOSS and hash(again) == hash(LOSS)
    assert JepaLoss(CONFIG, ANCHORS[:8]) != LOSS
    assert JepaLoss(JepaConfig(ENCODER, hidden=9), ANCHORS) != LOSS


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: JepaConfig(ENCODER, hidden=0), ConfigError, "hidden=0"),
        (lambda: JepaConfig(ENCODER, variance=-1.0), ConfigError, "variance=-1.0"),
        (lambda: JepaLoss(CONFIG, ANCHORS[:1]), WindowError, r"\(1, 8, 2\)"),
        (lambda: EmaOptimizer(FACTORY.inner, 1.0), ConfigError, "decay=1.0"),
        (
            lambda: EmaOptimizer(cast(Any, optax.sgd(1.0))),
            ConfigError,
            "expected an optimizer factory",
        ),
    ],
)
def test_what_is_out_of_its_domain_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()

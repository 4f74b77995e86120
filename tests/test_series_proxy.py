"""The patch transformer: what it reads, what it predicts, and its heads against numpy."""

import functools
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.diagnostics.autodiff import compare_with_autodiff
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy import Quantiles, SeriesConfig, SeriesLoss, StudentT, init_series
from metagrad_filter.proxy.series import last_observed

CONFIG = SeriesConfig(channels=2, patch=2, max_patches=4, width=8, layers=1, heads=2)
LOSS = SeriesLoss(CONFIG)
RNG = np.random.default_rng(0)
WINDOWS = RNG.normal(size=(5, 8, 2)).astype(np.float32)
WINDOWS[0, 1:5, 0] = np.nan
WINDOWS[1, 3] = np.nan
HOLES = np.isnan(WINDOWS)


@functools.cache
def params():
    return init_series(CONFIG, seed=1)


@functools.cache
def jitted(name="__call__", loss=LOSS):
    return jax.jit(getattr(loss, name))


def losses(windows, loss=LOSS):
    return np.asarray(jitted("__call__", loss)(params(), windows))


def test_missing_values_are_neither_read_nor_predicted():
    step_losses, predicted = jitted("step_losses")(params(), WINDOWS)
    later = np.arange(8)[:, None] >= CONFIG.patch
    np.testing.assert_array_equal(predicted, ~HOLES & later)
    assert not np.any(np.asarray(step_losses)[~np.asarray(predicted)])
    mean = np.asarray(step_losses).sum(axis=(1, 2)) / np.asarray(predicted).sum(axis=(1, 2))
    np.testing.assert_allclose(losses(WINDOWS), mean, rtol=1e-5)


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_infinite_values_are_missing_too(hole):
    windows = WINDOWS.copy()
    windows[HOLES] = hole
    np.testing.assert_array_equal(losses(windows), losses(WINDOWS))


def test_a_window_without_values_to_predict_has_no_loss_and_no_gradient():
    empty = WINDOWS.copy()
    empty[2, CONFIG.patch :] = np.nan
    empty[3] = np.nan
    found = losses(empty)
    assert found[2] == 0 and found[3] == 0 and found[0] != 0
    _, gradient, _ = _derivatives(params(), np.concatenate([empty[2:4]] * 3)[:5])
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_a_patch_is_predicted_from_the_past_alone():
    changed = WINDOWS.copy()
    changed[:, 4:] += 1.0
    before = [np.asarray(x)[:, :6] for x in jitted("points")(params(), WINDOWS)]
    after = [np.asarray(x)[:, :6] for x in jitted("points")(params(), changed)]
    # Steps 4 and 5 are predicted from steps 0 to 3, which are the same.
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)
    states = jitted("hidden")(params(), WINDOWS), jitted("hidden")(params(), changed)
    np.testing.assert_allclose(states[0][:, :2], states[1][:, :2], atol=1e-5)
    assert np.abs(states[0][:, 2:] - states[1][:, 2:]).max() > 1e-3


def test_windows_of_a_batch_do_not_see_each_other():
    np.testing.assert_allclose(losses(WINDOWS[::-1]), losses(WINDOWS)[::-1], rtol=1e-5)


@settings(max_examples=25)
@given(
    hnp.arrays(
        np.float32,
        (5, 8, 2),
        elements=st.one_of(
            st.floats(-3, 3, width=32),
            st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -3e38, 0.0]),
        ),
    )
)
def test_whatever_comes_has_finite_losses_and_derivatives(windows):
    value, gradient, product = _derivatives(params(), windows)
    for leaf in jax.tree.leaves((value, gradient, product)):
        assert np.isfinite(leaf).all()


@jax.jit
def _derivatives(p, windows):
    def objective(p):
        return LOSS(p, windows).sum()

    gradient = jax.grad(objective)(p)
    unit = jax.tree.map(jnp.ones_like, p)
    return objective(p), gradient, jax.jvp(jax.grad(objective), (p,), (unit,))[1]


@settings(max_examples=40)
@given(
    hnp.arrays(bool, (2, 9, 2), elements=st.booleans()),
    st.sampled_from([1, 3]),
)
def test_forecasts_start_from_the_last_observed_value(holes, patch):
    windows = np.arange(36, dtype=np.float32).reshape(2, 9, 2) + 1
    windows[holes] = np.nan
    found = np.asarray(last_observed(jnp.asarray(windows), patch))
    for b in range(2):
        for t in range(9):
            for c in range(2):
                past = windows[b, : t // patch * patch, c]
                past = past[~np.isnan(past)]
                assert found[b, t, c] == (past[-1] if len(past) else 0)


RAW = RNG.normal(size=(50, 2)).astype(np.float32)
BASE, VALUES = RNG.normal(size=(2, 50)).astype(np.float32)


@pytest.mark.parametrize("freedom", [2.5, 5.0, 30.0])
def test_the_student_t_head_is_that_density(freedom):
    head = StudentT(freedom, 0.1)
    scale = 0.1 + np.log1p(np.exp(RAW[:, 1]))
    density: Any = stats.t(freedom, loc=BASE + RAW[:, 0], scale=scale)
    np.testing.assert_allclose(
        head.losses(jnp.asarray(RAW), BASE, VALUES), -density.logpdf(VALUES), rtol=2e-5, atol=2e-5
    )
    for level in (0.5, 0.9):
        for found, expected in zip(head.interval(RAW, BASE, level), density.interval(level)):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head.point(RAW, BASE), density.median(), rtol=1e-5)


def test_quantiles_are_in_order_and_scored_by_pinball_loss():
    head = Quantiles((0.05, 0.5, 0.8, 0.95))
    raw = RNG.normal(size=(50, 4)).astype(np.float32)
    lower, upper = head.interval(raw, BASE, 0.9)
    middle = head.point(raw, BASE)
    np.testing.assert_allclose(middle, BASE + raw[:, 1], rtol=1e-5)
    gaps = np.log1p(np.exp(raw))
    quantiles = np.stack(
        [middle - gaps[:, 0], middle, middle + gaps[:, 2], middle + gaps[:, 2] + gaps[:, 3]], 1
    )
    np.testing.assert_allclose(lower, quantiles[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(upper, quantiles[:, 3], rtol=1e-4, atol=1e-5)
    levels, error = np.array(head.levels), VALUES[:, None] - quantiles
    pinball = np.where(error > 0, levels * error, (levels - 1) * error)
    np.testing.assert_allclose(head.losses(raw, BASE, VALUES), 2 * pinball.mean(1), rtol=1e-4)
    with pytest.raises(ConfigError, match=r"level 0.8 needs the quantiles 0.1 and 0.9"):
        head.interval(raw, BASE, 0.8)


@pytest.mark.slow
def test_the_adjoint_is_the_derivative_of_training():
    optimizer = optax.adamw(1e-2, b2=0.95)
    rng = np.random.default_rng(3)
    batches = rng.normal(size=(3, 4, 8, 2)).astype(np.float32)
    batches[0, 0, 2:5] = np.nan
    warm, state, _ = run(
        LOSS, optimizer, params(), optimizer.init(params()), batches, jnp.ones((3, 4))
    )
    found = compare_with_autodiff(
        LOSS,
        lambda p: LOSS(p, jnp.asarray(WINDOWS)).mean(),
        warm,
        state,
        batches,
        optimizer=optimizer,
    )
    assert found.relative_error < 1e-3


def test_training_learns_what_comes_next():
    config = SeriesConfig(channels=1, patch=4, max_patches=4, width=8, layers=1, heads=2)
    loss, optimizer = SeriesLoss(config), optax.adamw(1e-2)
    phase = np.random.default_rng(0).uniform(0, 2 * math.pi, (80, 16, 1))
    batches = np.sin(np.arange(16) + phase)[..., None].astype(np.float32)
    start = init_series(config)
    end, _, _ = jax.jit(functools.partial(run, loss, optimizer))(
        start, optimizer.init(start), batches, jnp.ones((80, 16))
    )
    before, after = (float(loss(p, batches[-1]).mean()) for p in (start, end))
    assert after < before - 0.5
    lower, upper, predicted = loss.intervals(end, batches[-1], 0.9)
    held = (batches[-1] > lower) & (batches[-1] < upper)
    assert 0.6 < np.mean(np.asarray(held)[np.asarray(predicted)]) <= 1


def test_equal_configurations_are_equal_and_travel():
    again = pickle.loads(pickle.dumps(LOSS))
    assert again == LOSS and hash(again) == hash(LOSS)
    other = SeriesLoss(SeriesConfig(2, 2, 4, 8, 1, 2, head=Quantiles()))
    assert other != LOSS and (LOSS.kind, LOSS.unit, other.unit) == ("series", 1.0, 0.0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 7, 2), "hold 7 steps.*multiple of patch=2 from 4.*to 8"),
        ((2, 2, 2), "hold 2 steps"),
        ((2, 10, 2), "hold 10 steps"),
        ((2, 8, 3), "have 3 channels, this transformer 2"),
    ],
)
def test_windows_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        LOSS(params(), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"patch": 2.0}, "patch=2.0"),
        ({"width": 10}, "width=10.*heads=4"),
        ({"activation": "tanh"}, "'tanh'"),
        ({"initializer_range": 0.0}, "initializer_range=0.0"),
        ({"head": "student"}, "head='student'"),
    ],
)
def test_configurations_out_of_their_domain_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SeriesConfig(**({"channels": 2} | fields))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StudentT(freedom=2.0), "freedom=2.0"),
        (lambda: StudentT(least_scale=0.0), "least_scale=0.0"),
        (lambda: Quantiles((0.5, 0.1)), r"levels=\(0.5, 0.1\)"),
        (lambda: Quantiles((0.1, 0.9)), "expected .5 among them"),
    ],
)
def test_heads_out_of_their_domain_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()

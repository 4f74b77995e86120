"""Held-out loss: the split, the mean, and its derivative for any batch size."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.targets import mean_loss

WINDOWS = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)
PARAMS = jnp.linspace(-1, 1, 4)


def loss(params, batch):
    return jnp.tanh(batch @ params) ** 2


@given(count=st.integers(2, 300), share=st.floats(0.001, 0.999))
def test_the_split_is_contiguous_disjoint_and_complete(count, share):
    windows = np.arange(count * 2).reshape(count, 2)
    target = mgf.HeldOutLoss(windows, gate_share=share)
    parts = [target.target_windows, target.gate_windows]
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), windows)
    # As near to the share as a non-empty remainder allows.
    assert abs(len(target.gate_windows) - share * count) <= 1


@pytest.mark.parametrize("batch_size", [1, 5, 7, 11, 12, 500])
def test_value_and_gradient_are_those_of_the_plain_mean(batch_size):
    target = mgf.HeldOutLoss(WINDOWS, batch_size=batch_size)
    for metric, windows in (
        (target.outer(loss), target.target_windows),
        (target.gate_metric(loss), target.gate_windows),
    ):
        value, gradient = jax.value_and_grad(metric)(PARAMS)
        plain = jax.value_and_grad(lambda p, w=windows: loss(p, jnp.asarray(w)).mean())(PARAMS)
        np.testing.assert_allclose(value, plain[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, plain[1], rtol=1e-5, atol=1e-7)


def test_the_last_batch_is_not_counted_twice():
    # 23 windows in batches of 10: the seven padding windows must weigh nothing.
    heavy = WINDOWS.copy()
    heavy[-1] *= 100
    found = mean_loss(loss, heavy, 10)(PARAMS)
    np.testing.assert_allclose(found, loss(PARAMS, jnp.asarray(heavy)).mean(), rtol=1e-6)


def test_second_derivatives_pass_through_the_batches():
    metric = mean_loss(loss, WINDOWS, 5)
    along = jnp.ones(4)
    _, found = jax.jvp(jax.grad(metric), (PARAMS,), (along,))
    _, plain = jax.jvp(
        jax.grad(lambda p: loss(p, jnp.asarray(WINDOWS)).mean()), (PARAMS,), (along,)
    )
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-6)


def test_the_same_loss_gets_the_same_callables():
    target = mgf.HeldOutLoss(WINDOWS)
    assert target.outer(loss) is target.outer(loss)
    assert target.gate_metric(loss) is target.gate_metric(loss)
    assert target.gate_metric(loss) is not target.outer(loss)
    assert target.outer(lambda params, batch: loss(params, batch)) is not target.outer(loss)


def test_a_target_survives_the_way_to_another_process():
    target = mgf.HeldOutLoss(WINDOWS, gate_share=0.3, batch_size=4)
    value = target.outer(loss)(PARAMS)
    copy = pickle.loads(pickle.dumps(target))
    np.testing.assert_array_equal(copy.gate_windows, target.gate_windows)
    assert float(copy.outer(loss)(PARAMS)) == float(value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate_share": 0.0}, ConfigError, "gate_share=0.0"),
        ({"gate_share": 1}, ConfigError, "gate_share=1"),
        ({"gate_share": float("nan")}, ConfigError, "gate_share=nan"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"windows": WINDOWS[:1]}, WindowError, r"\(1, 4\)"),
        ({"windows": WINDOWS[0]}, WindowError, r"\(4,\)"),
        ({"windows": []}, WindowError, r"\(0,\)"),
    ],
)
def test_errors_name_the_value(changes, error, message):
    arguments = {"windows": WINDOWS} | changes
    with pytest.raises(error, match=message):
        mgf.HeldOutLoss(**arguments)

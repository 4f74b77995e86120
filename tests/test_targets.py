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


# Halves, guards.


@pytest.mark.parametrize("count", [2, 3, 4, 9, 23])
def test_the_mean_of_the_halves_is_the_outer_metric(count):
    target = mgf.HeldOutLoss(WINDOWS[:count], gate_share=1 / count, batch_size=2)
    assert len(target.target_windows) == count - 1
    first, second = target.halves(loss)
    np.testing.assert_allclose(
        (first(PARAMS) + second(PARAMS)) / 2, target.outer(loss)(PARAMS), rtol=1e-6
    )
    if count > 2:
        assert float(first(PARAMS)) != float(second(PARAMS))
    assert target.halves(loss) == (first, second)  # the same objects: nothing compiles twice


def guarded(**weights):
    parts = {name: mgf.HeldOutLoss(WINDOWS[i : i + 6]) for i, name in enumerate(("a", "b"), 1)}
    return mgf.GuardedTarget(mgf.HeldOutLoss(WINDOWS), parts, weights=weights or None)


def test_a_guarded_target_has_parts_with_weights_and_guards_at_the_gate():
    target = guarded(b=0, a=2)
    plain = mgf.HeldOutLoss(WINDOWS)
    assert target.weights == {"target": 1.0, "a": 2.0} and list(target.parts) == ["target", "a"]
    assert float(target.outer(loss)(PARAMS)) == float(plain.outer(loss)(PARAMS))
    assert float(target.gate_metric(loss)(PARAMS)) == float(plain.gate_metric(loss)(PARAMS))
    np.testing.assert_array_equal(target.gate_windows, plain.gate_windows)
    guards = target.guard_metrics(loss)
    assert list(guards) == ["a", "b"]
    judged = target.guards["b"].gate_windows
    np.testing.assert_allclose(
        guards["b"](PARAMS), loss(PARAMS, jnp.asarray(judged)).mean(), rtol=1e-6
    )
    assert target.held_out == (target.target, *target.guards.values())
    assert guarded().weights == {"target": 1.0, "a": 1.0, "b": 1.0}
    assert plain.guard_metrics(loss) == {} and list(plain.parts) == ["target"]
    copy = pickle.loads(pickle.dumps(target))
    assert copy.weights == target.weights


@pytest.mark.parametrize(
    ("guards", "weights", "message"),
    [
        (("target",), {}, "a guard is called 'target'"),
        (("",), {}, "a guard is called ''"),
        (("a",), {"b": 1.0}, "weights has 'b'"),
        (("a",), {"a": -1.0}, "the weight of 'a' is -1.0"),
        (("a",), {"a": float("nan")}, "the weight of 'a' is nan"),
        (("a",), {"target": 0.0}, "the weight of 'target' is 0"),
    ],
)
def test_a_guarded_target_names_what_is_wrong(guards, weights, message):
    target = mgf.HeldOutLoss(WINDOWS)
    with pytest.raises(ConfigError, match=message):
        mgf.GuardedTarget(target, dict.fromkeys(guards, target), weights=weights)

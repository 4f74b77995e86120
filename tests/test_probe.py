"""Probe scores against an explicit gradient of every window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, WindowError
from metagrad_filter.metagradient.probe import score_with_probes

COUNT, WIDTH = 37, 3


def loss(params, batch):
    return jnp.tanh(batch["x"] @ params["w"] + params["b"]) * batch["y"]


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=WIDTH), jnp.float32),
        "b": jnp.asarray(rng.normal(), jnp.float32),
    }


def windows(count=COUNT):
    rng = np.random.default_rng(5)
    return {
        "x": rng.normal(size=(count, WIDTH)).astype(np.float32),
        "y": rng.normal(size=count).astype(np.float32),
    }


PARAMS, PROBE = tree(0), tree(1)


def explicit(probe, data):
    """-<grad loss(window), probe>, one window and one reverse pass at a time."""
    scores = []
    for i in range(len(data["y"])):
        one = {name: x[i : i + 1] for name, x in data.items()}
        gradient = jax.grad(lambda p, one=one: loss(p, one)[0])(PARAMS)
        products = jax.tree.map(jnp.vdot, gradient, probe)
        scores.append(-float(sum(jax.tree.leaves(products))))
    return np.array(scores)


@pytest.fixture(scope="module")
def expected():
    return explicit(PROBE, windows())


# Sizes that do and do not divide N, N itself, more than N, and one with several calls of 16 pieces.
@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, COUNT, COUNT + 9])
def test_probe_scores_are_products_with_each_windows_gradient(batch_size, expected):
    scores = mgf.probe_scores(loss, PARAMS, PROBE, windows(), batch_size=batch_size)
    assert scores.dtype == np.float32 and scores.shape == (COUNT,)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_no_windows_give_no_scores():
    assert mgf.probe_scores(loss, PARAMS, PROBE, windows(0)).shape == (0,)


def test_several_probes_give_what_separate_calls_give():
    probes = [tree(seed) for seed in (1, 2, 3)]
    done = []
    scores = score_with_probes(loss, PARAMS, probes, windows(), batch_size=2, progress=done.append)
    assert done == [32, COUNT]
    for row, probe in zip(scores, probes):
        alone = mgf.probe_scores(loss, PARAMS, probe, windows(), batch_size=2)
        np.testing.assert_allclose(row, alone, rtol=1e-5, atol=1e-6)


ERRORS = {
    "another tree": ({"probe": {"w": PROBE["w"]}}, ConfigError, "not shaped like params"),
    "another shape": ({"probe": {**PROBE, "w": jnp.ones(4)}}, ConfigError, "not shaped like"),
    "dict of probes": ({"probe": {"held out": PROBE}}, ConfigError, "one entry of the dict"),
    "uneven windows": ({"windows": {**windows(), "y": np.ones(3)}}, WindowError, r"\[3, 37\]"),
    "no leading axis": ({"windows": {**windows(), "y": np.float32(1)}}, WindowError, "leading"),
    "no windows at all": ({"windows": {}}, WindowError, r"\[\]"),
    "batch size 0": ({"batch_size": 0}, ConfigError, "batch_size=0"),
    "batch size -4": ({"batch_size": -4}, ConfigError, "batch_size=-4"),
    "mean loss": (
        {"loss": lambda params, batch: loss(params, batch).mean()},
        ConfigError,
        r"\(\).*\(37,\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_value(case):
    changes, error, message = ERRORS[case]
    arguments = {"loss": loss, "params": PARAMS, "probe": PROBE, "windows": windows()} | changes
    with pytest.raises(error, match=message):
        mgf.probe_scores(**arguments)


def test_a_score_that_is_not_finite_names_its_window():
    data = windows()
    data["y"][[11, 30]] = np.inf
    with pytest.raises(NonFiniteMetagradient, match=r"2 of 37.*window 11"):
        mgf.probe_scores(loss, PARAMS, PROBE, data, batch_size=4)

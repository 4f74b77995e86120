"""Targets of series against their numpy definitions and against finite differences."""

import functools
import pickle
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.proxy import SeriesConfig, SeriesLoss, init_series
from metagrad_filter.series_targets import (
    CalibrationGuard,
    EventError,
    InterventionLoss,
    LatentGeometry,
    RegimeProbeLoss,
    SoftRecall,
    ridge_probe,
)

CONFIG = SeriesConfig(channels=2, patch=2, max_patches=4, width=8, layers=1, heads=2)
LOSS = SeriesLoss(CONFIG)
RNG = np.random.default_rng(0)
COUNT = 80
WINDOWS = RNG.normal(size=(COUNT, 8, 2)).astype(np.float32)
WINDOWS[RNG.random(WINDOWS.shape) < 0.05] = np.nan
LABELS = np.arange(COUNT) % 3
ONSETS = RNG.integers(2, 8, COUNT)
EVENTS = RNG.random((COUNT, 8)) < 0.3

TARGETS = {
    "recall": SoftRecall(WINDOWS, LABELS == 0, batch_size=16),
    "regimes": RegimeProbeLoss(WINDOWS, LABELS, batch_size=16),
    "intervention": InterventionLoss(WINDOWS, ONSETS, span=3, batch_size=16),
    "event": EventError(WINDOWS, EVENTS, batch_size=16),
    "event in a channel": EventError(WINDOWS, EVENTS, channels=[1], batch_size=16),
    "effective rank": LatentGeometry(WINDOWS, batch_size=16),
    "log det": LatentGeometry(WINDOWS, measure="log_det", batch_size=16),
    "calibration": CalibrationGuard(WINDOWS, batch_size=16),
}


@functools.cache
def params():
    return init_series(CONFIG, seed=1)


@functools.cache
def measured(name, part="outer"):
    """Value and gradient of a target at `params()`."""
    metric = getattr(TARGETS[name], part)(LOSS)
    return jax.jit(jax.value_and_grad(metric))(params())


def states(rows):
    return np.asarray(LOSS.hidden(params(), WINDOWS[rows]), np.float64)


def ridge(x, y, share):
    middle, level = x.mean(0), y.mean(0)
    gram = (x - middle).T @ (x - middle) / len(x)
    penalty = share * np.trace(gram) / len(gram) + 1e-9
    moment = (x - middle).T @ (y - level) / len(x)
    return np.linalg.inv(gram + penalty * np.eye(len(gram))) @ moment, middle, level


def cross_fitted(x, y, share):
    even, found = np.arange(len(x)) % 2 == 0, np.zeros(y.shape)
    for fitted, judged in ((even, ~even), (~even, even)):
        weights, middle, level = ridge(x[fitted], y[fitted], share)
        found[judged] = (x[judged] - middle) @ weights + level
    return found


def definition(name, rows):
    """The target in numpy, from hidden states, losses and intervals."""
    labels, windows = LABELS[rows], WINDOWS[rows]
    if name == "recall":
        rare = labels == 0
        scores = cross_fitted(states(rows)[:, -1], rare[:, None].astype(float), 0.1)[:, 0]
        scores = scores / (scores.std() + 1e-6)
        threshold = np.quantile(scores[~rare], 0.9)
        return 1 - np.mean(1 / (1 + np.exp(-(scores[rare] - threshold) / 0.5)))
    if name == "regimes":
        logits = 5 * cross_fitted(states(rows)[:, -1], np.eye(3)[labels], 0.1)
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return -np.mean(np.log(shares[np.arange(len(labels)), labels]))
    if name == "intervention":
        losses, predicted = map(np.asarray, LOSS.step_losses(params(), windows))
        found = [
            losses[i, t, c]
            for i, onset in enumerate(ONSETS[rows])
            for t in range(onset, min(onset + 3, 8))
            for c in range(2)
            if predicted[i, t, c]
        ]
        return np.mean(found)
    if name.startswith("event"):
        points, predicted = map(np.asarray, LOSS.points(params(), windows))
        counted = predicted & EVENTS[rows][..., None]
        counted[..., 0] &= name == "event"
        return np.mean(np.square(points - windows)[counted])
    if name == "calibration":
        lower, upper, predicted = map(np.asarray, LOSS.intervals(params(), windows, 0.9))
        softness = 0.02 * (upper - lower)
        held = 1 / (1 + np.exp(-(windows - lower) / softness))
        held = held / (1 + np.exp(-(upper - windows) / softness))
        coverage = held[predicted].mean()
        return np.asarray(LOSS(params(), windows)).mean() + 10 * (coverage - 0.9) ** 2
    x = states(rows).reshape(-1, 8)
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    if name == "effective rank":
        shares = values / values.sum()
        return np.sum(shares * np.log(shares))
    return -np.mean(np.log(values / values.mean() + 1e-4))


@pytest.mark.parametrize("part", ["outer", "gate_metric"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_value_is_that_of_its_definition(name, part):
    rows = slice(0, COUNT // 2) if part == "outer" else slice(COUNT // 2, COUNT)
    np.testing.assert_allclose(
        measured(name, part)[0], definition(name, rows), rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", TARGETS)
def test_the_gradient_is_that_of_finite_differences(name):
    gradient = measured(name)[1]
    rng = np.random.default_rng(2)
    for _ in range(3):
        along = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params())
        # Along the gradient as well, for a random direction has little of it.
        along = jax.tree.map(lambda a, g: a * 0.05 + g / (norm(gradient) + 1e-9), along, gradient)
        step = 2e-3
        ends = [
            float(_at(name, jax.tree.map(lambda p, a, s=s: p + s * a, params(), along)))
            for s in (step, -step)
        ]
        slope = sum(
            jax.tree.leaves(jax.tree.map(lambda g, a: float(jnp.vdot(g, a)), gradient, along))
        )
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=0.05, atol=2e-3)


def norm(tree):
    return float(np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree))))


@functools.cache
def _compiled(name):
    return jax.jit(TARGETS[name].outer(LOSS))


def _at(name, p):
    return _compiled(name)(p)


@pytest.mark.parametrize("name", TARGETS)
def test_halves_are_measured_on_disjoint_windows(name):
    first, second = TARGETS[name].halves(LOSS)
    cut = COUNT // 4
    for metric, rows in ((first, slice(0, cut)), (second, slice(cut, 2 * cut))):
        np.testing.assert_allclose(
            jax.jit(metric)(params()), definition(name, rows), rtol=5e-3, atol=1e-3
        )
    assert TARGETS[name].halves(LOSS) == (first, second)


def test_every_target_has_an_identity_of_its_own_and_travels():
    found = {target.identity for target in TARGETS.values()}
    assert len(found) == len(TARGETS) and "" not in found
    assert mgf.HeldOutLoss(WINDOWS).identity == ""
    other = SoftRecall(WINDOWS, LABELS == 1, batch_size=16)
    assert other.identity != TARGETS["recall"].identity
    assert SoftRecall(WINDOWS, LABELS == 0, ridge=0.2).identity != TARGETS["recall"].identity
    copy = pickle.loads(pickle.dumps(TARGETS["recall"]))
    assert copy.identity == TARGETS["recall"].identity
    # Another program of the same sums: they may be taken in another order.
    assert copy.outer(LOSS)(params()) == pytest.approx(float(measured("recall")[0]), rel=1e-5)


def test_an_event_that_the_model_never_predicts_is_no_target_of_zero():
    first = np.zeros((COUNT, 8), bool)
    first[:, 0] = True  # the first patch is context only
    assert np.isnan(EventError(WINDOWS, first).outer(LOSS)(params()))


def test_recall_rises_with_what_sets_rare_windows_apart():
    """Windows whose state is their label are found at once; those of noise are not."""

    class Revealing:
        @staticmethod
        def hidden(params, windows):
            return windows[:, :1, :] * params + windows[:, 1:2, :]

    rng = np.random.default_rng(0)
    rare = rng.random(400) < 0.2
    windows = rng.normal(size=(400, 2, 3)).astype(np.float32)
    windows[:, 0] = rare[:, None]
    target = SoftRecall(windows, rare, temperature=0.1)
    metric = jax.jit(jax.value_and_grad(target.outer(cast(Any, Revealing()))))
    found = [metric(jnp.float32(scale)) for scale in (0.0, 2.0, 20.0)]
    missed = [float(value) for value, _ in found]
    assert missed[0] > 0.8 and missed[1] < 0.6 and missed[2] < 0.05
    assert float(found[1][1]) < 0


def test_a_mixture_is_a_guarded_target():
    target = mgf.GuardedTarget(
        TARGETS["recall"],
        {"calibration": TARGETS["calibration"], "loss": mgf.HeldOutLoss(WINDOWS)},
        weights={"calibration": 0.5},
    )
    assert list(target.parts) == ["target", "calibration", "loss"]
    assert target.weights == {"target": 1.0, "calibration": 0.5, "loss": 1.0}
    guards = target.guard_metrics(LOSS)
    np.testing.assert_allclose(
        guards["calibration"](params()), measured("calibration", "gate_metric")[0], rtol=1e-5
    )


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(-100, 100), st.floats(0.01, 100), st.floats(0.01, 10))
def test_the_probe_is_ridge_regression(seed, level, scale, share):
    rng = np.random.default_rng(seed)
    x, y = level + scale * rng.normal(size=(12, 4)), rng.normal(size=(12, 2))
    x, y = x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)
    weights, bias = _probe(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), share)
    wanted, middle, level = ridge(x, y, share)
    size = np.abs(wanted).max()
    np.testing.assert_allclose(weights, wanted, rtol=1e-3, atol=1e-2 * size)
    predicted = x @ np.asarray(weights, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(predicted, level + (x - middle) @ wanted, atol=2e-2)


_probe = jax.jit(ridge_probe)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SoftRecall(WINDOWS, LABELS[:5] == 0), WindowError, "5 labels for 80 windows"),
        (lambda: SoftRecall(WINDOWS, LABELS < 0), WindowError, "0 windows of class True"),
        (lambda: SoftRecall(WINDOWS, LABELS == 0, false_alarms=0.0), ConfigError, "false_alarms"),
        (lambda: SoftRecall(WINDOWS, LABELS == 0, temperature=-1.0), ConfigError, "temperature"),
        (lambda: RegimeProbeLoss(WINDOWS, LABELS * 0), WindowError, r"regimes are all \[0\]"),
        (
            lambda: RegimeProbeLoss(WINDOWS, np.arange(COUNT) > 70),
            WindowError,
            "first half of the target part holds 0 windows of class 1",
        ),
        (lambda: RegimeProbeLoss(WINDOWS, LABELS, ridge=0.0), ConfigError, "ridge=0.0"),
        (lambda: InterventionLoss(WINDOWS, ONSETS + 5), WindowError, r"in \[0, 8\)"),
        (lambda: InterventionLoss(WINDOWS, ONSETS, span=0), ConfigError, "span=0"),
        (lambda: EventError(WINDOWS, EVENTS[:, :4]), WindowError, r"shape \(80, 4\)"),
        (lambda: EventError(WINDOWS, EVENTS, channels=[2]), ConfigError, r"in \[0, 2\)"),
        (lambda: EventError(WINDOWS, EVENTS, channels=[]), ConfigError, "None for all"),
        (lambda: EventError(WINDOWS, EVENTS, channels=["wind"]), ConfigError, "positions in"),
        (lambda: EventError(WINDOWS[..., 0], EVENTS), WindowError, "expected windows"),
        (lambda: EventError(WINDOWS, 0 * EVENTS), WindowError, "no observed value at a step"),
        (lambda: EventError(np.nan * WINDOWS, EVENTS), WindowError, "no observed value at a step"),
        (lambda: LatentGeometry(WINDOWS, measure="volume"), ConfigError, "measure='volume'"),
        (lambda: CalibrationGuard(WINDOWS, level=1.0), ConfigError, "level=1.0"),
        (lambda: CalibrationGuard(WINDOWS, gate_share=2.0), ConfigError, "gate_share=2.0"),
        (
            lambda: LatentGeometry(WINDOWS).outer(lambda p, w: w),
            ConfigError,
            r"asks the loss for hidden\(...\), which function does not have",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()

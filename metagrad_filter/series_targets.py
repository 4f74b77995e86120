"""Outer metrics beyond the mean loss: what a model is wanted for, as a function of its parameters.

    SoftRecall        are rare events found, at a stated rate of false alarms?
    RegimeProbeLoss   can a linear probe tell regimes apart by the hidden states?
    EventError        how far off are forecasts of the steps that matter?
    InterventionLoss  how well is what follows an intervention predicted?
    LatentGeometry    how many dimensions do the hidden states use?
    CalibrationGuard  do intervals hold as often as they say, and normal windows stay likely?

Each is a `HeldOutMetric`: lower is better, differentiable in the parameters, split into a part that
is differentiated and a part that the gate judges by. `GuardedTarget` mixes them with weights. They
ask the loss for more than a number a window: `hidden(params, windows) -> (B, P, D)`, and some for
`step_losses`, `points` or `intervals` (see `SeriesLoss`); `DecoderLoss` and `JepaLoss` have
`hidden` too.

Probes are ridge regressions in closed form, so no inner optimisation has to be differentiated, and
cross-fitted: each half of the windows is predicted by the fit on the other half.

Cost: a forward pass a window; a probe adds one solve of `D x D`.

References:
  Hastie et al., 2009, The Elements of Statistical Learning, section 3.4.1 (ridge regression);
  Roy and Vetterli, 2007, The effective rank: a measure of effective dimensionality.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.targets import HeldOutMetric
from metagrad_filter.types import Loss, PyTree

Metric = Callable[[PyTree], jax.Array]


class _Labelled(HeldOutMetric):
    """A metric with something known about each window: `(N, ...)` labels beside the windows."""

    def __init__(self, windows, labels, *, gate_share: float, batch_size: int, **options: Any):
        super().__init__(windows, gate_share=gate_share, batch_size=batch_size)
        if len(labels) != len(self.windows):
            raise WindowError(
                f"there are {len(labels)} labels for {len(self.windows)} windows; pass one each."
            )
        self.labels = labels
        self.options = options

    @property
    def identity(self) -> str:
        labels = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes()).hexdigest()
        return f"{type(self).__name__} {sorted(self.options.items())} {labels}"

    def _rows_by_part(self) -> dict[str, slice]:
        half = self._cut // 2
        return {
            "first half of the target part": slice(0, half),
            "second half of the target part": slice(half, self._cut),
            "gate part": slice(self._cut, len(self.windows)),
        }

    def _check_classes(self, classes: np.ndarray, least: int) -> None:
        """Refuses a split in which a part lacks a class; cross-fitting needs each twice and more"""
        for name, rows in self._rows_by_part().items():
            counts = [int(np.sum(self.labels[rows] == c)) for c in classes]
            if min(counts) < least:
                worst = classes[int(np.argmin(counts))]
                raise WindowError(
                    f"the {name} holds {min(counts)} windows of class {worst}; expected at least "
                    f"{least} of each class: pass more windows, or in another order."
                )


class SoftRecall(_Labelled):
    """1 - soft recall of rare events at a rate of false alarms; in (0, 1).

    A ridge probe on the hidden states scores each window; the threshold is the quantile of the
    scores of windows without the event; recall is the mean over windows with it of
    `sigmoid((score - threshold) / temperature)`, in units of the scores' standard deviation.

    Args:
      windows: `(N, ...)` held-out windows.
      rare: `(N,)` bool, where the event is.
      false_alarms: share of the other windows above the threshold, in (0, 1).
      temperature: softness of the step; low ones follow the recall closely, and teach little.
      ridge: of the probe, a share of the states' mean variance.
      gate_share, batch_size: as for `HeldOutMetric`.

    Raises:
      ConfigError: an option is out of its domain.
      WindowError: a part of the split has too few windows with or without the event.
    """

    def __init__(
        self,
        windows: np.ndarray,
        rare: np.ndarray,
        *,
        false_alarms: float = 0.1,
        temperature: float = 0.5,
        ridge: float = 0.1,
        gate_share: float = 0.5,
        batch_size: int = 128,
    ):
        _check_share("false_alarms", false_alarms)
        _check_positive(temperature=temperature, ridge=ridge)
        super().__init__(
            windows,
            np.asarray(rare, bool),
            gate_share=gate_share,
            batch_size=batch_size,
            false_alarms=false_alarms,
            temperature=temperature,
            ridge=ridge,
        )
        self._check_classes(np.array([False, True]), 4)

    def _function(self, loss: Loss, rows: slice) -> Metric:
        windows, rare = self.windows[rows], self.labels[rows]
        options, size = self.options, self.batch_size

        def metric(params: PyTree) -> jax.Array:
            states = last_states(loss, params, windows, size)
            scores = cross_fitted(states, rare.astype(np.float32)[:, None], options["ridge"])[:, 0]
            scores = scores / (jnp.std(scores) + 1e-6)
            threshold = jnp.quantile(scores[~rare], 1 - options["false_alarms"])
            return 1 - jnp.mean(jax.nn.sigmoid((scores[rare] - threshold) / options["temperature"]))

        return metric


class RegimeProbeLoss(_Labelled):
    """Cross-entropy in nats of a ridge probe that tells regimes apart by the hidden states.

    The probe predicts indicators of the regimes; `sharpness` times what it predicts are the logits
    of a softmax.

    Args:
      windows: `(N, ...)` held-out windows.
      regimes: `(N,)` integers.
      ridge: of the probe, a share of the states' mean variance.
      sharpness: logits for a prediction of 1.
      gate_share, batch_size: as for `HeldOutMetric`.

    Raises:
      ConfigError: an option is out of its domain.
      WindowError: a part of the split lacks a regime, or there is one regime only.
    """

    def __init__(
        self,
        windows: np.ndarray,
        regimes: np.ndarray,
        *,
        ridge: float = 0.1,
        sharpness: float = 5.0,
        gate_share: float = 0.5,
        batch_size: int = 128,
    ):
        _check_positive(ridge=ridge, sharpness=sharpness)
        names, indices = np.unique(np.asarray(regimes), return_inverse=True)
        super().__init__(
            windows,
            indices.ravel(),
            gate_share=gate_share,
            batch_size=batch_size,
            ridge=ridge,
            sharpness=sharpness,
        )
        if len(names) < 2:
            raise WindowError(f"regimes are all {names.tolist()}; expected two or more.")
        self._check_classes(np.arange(len(names)), 2)
        self._count = len(names)

    def _function(self, loss: Loss, rows: slice) -> Metric:
        windows, labels = self.windows[rows], self.labels[rows]
        indicators = np.eye(self._count, dtype=np.float32)[labels]
        options, size = self.options, self.batch_size

        def metric(params: PyTree) -> jax.Array:
            states = last_states(loss, params, windows, size)
            logits = options["sharpness"] * cross_fitted(states, indicators, options["ridge"])
            return -jnp.mean(jnp.sum(indicators * jax.nn.log_softmax(logits), axis=1))

        return metric


class EventError(_Labelled):
    """Mean squared error of the median forecast at the steps of events, in squared scaled units.

    Where a model is judged by its point forecasts of some steps, this is that judgement itself. The
    mean loss of the windows with an event is mostly about the steps around it.

    Args:
      windows: `(N, T, C)` held-out windows, each with an event.
      events: `(N, T)` bool, the steps that count.
      channels: those that count, all by default.
      gate_share, batch_size: as for `HeldOutMetric`.

    Raises:
      ConfigError: a channel is not there.
      WindowError: windows are not `(N, T, C)` or events not `(N, T)`, or a part of the split has no
        observed value at a step of an event.
    """

    def __init__(
        self,
        windows: np.ndarray,
        events: np.ndarray,
        *,
        channels: Sequence[int] | None = None,
        gate_share: float = 0.5,
        batch_size: int = 128,
    ):
        events = np.asarray(events, bool)
        windows = np.asarray(windows)
        if windows.ndim != 3 or events.shape != windows.shape[:2]:
            raise WindowError(
                f"events have shape {events.shape} for windows {windows.shape}; expected windows "
                "(N, T, C) and one bool for each window and step."
            )
        every = np.arange(windows.shape[2])
        chosen = every if channels is None else np.asarray(channels)
        if not chosen.size or chosen.dtype.kind not in "iu" or not np.isin(chosen, every).all():
            raise ConfigError(
                f"channels={channels!r}; expected positions in [0, {len(every)}), or None for all."
            )
        super().__init__(
            windows,
            events[..., None] & np.isin(every, chosen) & np.isfinite(windows),
            gate_share=gate_share,
            batch_size=batch_size,
        )
        for name, rows in self._rows_by_part().items():
            if not self.labels[rows].any():
                raise WindowError(
                    f"the {name} holds no observed value at a step of an event; expected at least "
                    "one: pass more windows, or in another order."
                )

    def _function(self, loss: Loss, rows: slice) -> Metric:
        windows, measured = self.windows[rows], self.labels[rows]
        points, size = _asked(loss, "points"), self.batch_size

        def metric(params: PyTree) -> jax.Array:
            def look(batch):
                forecast, predicted = points(params, batch)
                return jnp.square(forecast - jnp.where(predicted, batch, 0)), predicted

            return _mean_where(measured, *over_batches(look, windows, size))

        return metric


class InterventionLoss(_Labelled):
    """Mean loss of the values in the steps that follow an intervention, in the loss's unit.

    Args:
      windows: `(N, T, C)` held-out windows, each with one intervention.
      onsets: `(N,)` step of each, in [0, T).
      span: steps from the onset on that are measured; None for all that follow.
      gate_share, batch_size: as for `HeldOutMetric`.

    Raises:
      ConfigError: `span` is not positive.
      WindowError: an onset lies outside its window.
    """

    def __init__(
        self,
        windows: np.ndarray,
        onsets: np.ndarray,
        *,
        span: int | None = None,
        gate_share: float = 0.5,
        batch_size: int = 128,
    ):
        onsets = np.asarray(onsets)
        if span is not None and (type(span) is not int or span < 1):
            raise ConfigError(f"span={span!r}; expected a positive number of steps, or None.")
        super().__init__(windows, onsets, gate_share=gate_share, batch_size=batch_size, span=span)
        length = self.windows.shape[1]
        if onsets.dtype.kind not in "iu" or not ((onsets >= 0) & (onsets < length)).all():
            raise WindowError(
                f"onsets are {onsets.dtype} from {onsets.min()} to {onsets.max()}; expected "
                f"integers in [0, {length}), the step of each window at which something is done."
            )

    def _function(self, loss: Loss, rows: slice) -> Metric:
        windows, onsets = self.windows[rows], self.labels[rows]
        after = np.arange(windows.shape[1]) - onsets[:, None]
        span = windows.shape[1] if self.options["span"] is None else self.options["span"]
        measured = (after >= 0) & (after < span)
        step_losses, size = _asked(loss, "step_losses"), self.batch_size

        def metric(params: PyTree) -> jax.Array:
            found = over_batches(lambda batch: step_losses(params, batch), windows, size)
            return _mean_where(measured[..., None], *found)

        return metric


class LatentGeometry(HeldOutMetric):
    """How unhealthy the covariance of the hidden states is: all of them, every position.

    `measure="effective_rank"`: minus the log of the exponential of the entropy of the covariance's
    normalised eigenvalues; 0 where all lie on a line, -log D where they fill all dimensions alike.
    `measure="log_det"`: minus the mean log eigenvalue of the covariance over its mean eigenvalue,
    with a floor of 1e-4; it sees small dimensions that the rank overlooks.

    Args:
      windows: `(N, ...)` held-out windows.
      measure: "effective_rank" or "log_det".
      gate_share, batch_size: as for `HeldOutMetric`.

    Raises:
      ConfigError: another measure.
    """

    def __init__(
        self,
        windows: np.ndarray,
        *,
        measure: str = "effective_rank",
        gate_share: float = 0.5,
        batch_size: int = 128,
    ):
        if measure not in _GEOMETRY:
            raise ConfigError(f"measure={measure!r}; expected one of {sorted(_GEOMETRY)}.")
        super().__init__(windows, gate_share=gate_share, batch_size=batch_size)
        self.measure = measure

    @property
    def identity(self) -> str:
        return f"LatentGeometry {self.measure}"

    def _function(self, loss: Loss, rows: slice) -> Metric:
        windows, size = self.windows[rows], self.batch_size
        measured, hidden = _GEOMETRY[self.measure], _asked(loss, "hidden")

        def metric(params: PyTree) -> jax.Array:
            states = over_batches(lambda batch: hidden(params, batch), windows, size)
            return measured(states.reshape(-1, states.shape[-1]))

        return metric


class CalibrationGuard(HeldOutMetric):
    """Mean loss of normal windows, plus what their intervals hold too little or too much.

    `mean loss + weight * (soft coverage - level)^2`, where a value at a distance d inside both
    bounds counts `sigmoid(d / softness)` for each, d in widths of its interval. A target of rare
    events alone buys recall by widening every interval; this notices.

    Args:
      windows: `(N, T, C)` held-out windows of normal operation.
      level: probability that the interval should hold, in (0, 1).
      weight: of the squared deviation, in the loss's unit.
      softness: of the bounds, as a share of the interval's width.
      gate_share, batch_size: as for `HeldOutMetric`.

    Raises:
      ConfigError: an option is out of its domain.
    """

    def __init__(
        self,
        windows: np.ndarray,
        *,
        level: float = 0.9,
        weight: float = 10.0,
        softness: float = 0.02,
        gate_share: float = 0.5,
        batch_size: int = 128,
    ):
        _check_share("level", level)
        _check_positive(weight=weight, softness=softness)
        super().__init__(windows, gate_share=gate_share, batch_size=batch_size)
        self.level, self.weight, self.softness = level, weight, softness

    @property
    def identity(self) -> str:
        return f"CalibrationGuard {self.level} {self.weight} {self.softness}"

    def _function(self, loss: Loss, rows: slice) -> Metric:
        windows, size = self.windows[rows], self.batch_size
        intervals = _asked(loss, "intervals")

        def metric(params: PyTree) -> jax.Array:
            def look(batch):
                lower, upper, predicted = intervals(params, batch, self.level)
                width = self.softness * (upper - lower)
                values = jnp.where(predicted, batch, lower)
                held = jax.nn.sigmoid((values - lower) / width)
                held = held * jax.nn.sigmoid((upper - values) / width)
                return loss(params, batch), jnp.where(predicted, held, 0), predicted

            losses, held, predicted = over_batches(look, windows, size)
            coverage = jnp.sum(held) / jnp.maximum(jnp.sum(predicted), 1)
            return jnp.mean(losses) + self.weight * (coverage - self.level) ** 2

        return metric


def over_batches(function: Callable[[Any], Any], windows: np.ndarray, size: int) -> Any:
    """`function` of all `(N, ...)` windows, `size` at a time in every derivative too."""
    size = min(size, len(windows))
    count = -(-len(windows) // size)
    index = np.minimum(np.arange(count * size), len(windows) - 1)
    pieces = jnp.asarray(windows[index].reshape(count, size, *windows.shape[1:]))
    found = jax.lax.map(jax.checkpoint(function), pieces)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(windows)], found)


def last_states(loss: Loss, params: PyTree, windows: np.ndarray, size: int) -> jax.Array:
    """`(N, D)` hidden state of each window's last position, which has seen all of it."""
    hidden = _asked(loss, "hidden")
    return over_batches(lambda batch: hidden(params, batch)[:, -1], windows, size)


def cross_fitted(states: jax.Array, targets: np.ndarray, ridge: float) -> jax.Array:
    """Ridge predictions `(N, K)` of `(N, K)` targets; even rows by the fit on odd ones and back."""
    even = np.arange(len(targets)) % 2 == 0
    found = jnp.zeros(targets.shape, states.dtype)
    for fitted, judged in ((even, ~even), (~even, even)):
        weights, bias = ridge_probe(states[fitted], jnp.asarray(targets[fitted]), ridge)
        found = found.at[judged].set(states[judged] @ weights + bias)
    return found


def ridge_probe(states: jax.Array, targets: jax.Array, ridge: float) -> tuple[jax.Array, jax.Array]:
    """Closed-form ridge regression of `(N, K)` targets on `(N, D)` states: `(D, K)` and `(K,)`.

    `ridge` is a share of the mean variance of the states, so their scale does not matter.
    """
    middle, level = states.mean(axis=0), targets.mean(axis=0)
    x, y = states - middle, targets - level
    gram = x.T @ x / len(x)
    width = gram.shape[0]
    penalty = ridge * jnp.trace(gram) / width + 1e-9
    weights = jnp.linalg.solve(gram + penalty * jnp.eye(width, dtype=gram.dtype), x.T @ y / len(x))
    return weights, level - middle @ weights


def _mean_where(measured: np.ndarray, values: jax.Array, predicted: jax.Array) -> jax.Array:
    """Mean of the `(N, T, C)` values that are predicted and measured.

    NaN where the model predicts none of them, which a round refuses; 0 would be a target that
    every window serves alike.
    """
    counted = predicted & measured
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.sum(counted)


def _effective_rank(states: jax.Array) -> jax.Array:
    """Minus the entropy of the normalised eigenvalues."""
    values = jnp.maximum(jnp.linalg.eigvalsh(_covariance(states)), 1e-12)
    shares = values / jnp.sum(values)
    return jnp.sum(shares * jnp.log(shares))


def _log_det(states: jax.Array) -> jax.Array:
    covariance = _covariance(states)
    width = covariance.shape[0]
    scaled = covariance * width / jnp.trace(covariance)
    return -jnp.linalg.slogdet(scaled + 1e-4 * jnp.eye(width, dtype=scaled.dtype))[1] / width


def _covariance(states: jax.Array) -> jax.Array:
    x = states - states.mean(axis=0)
    return x.T @ x / len(x)


_GEOMETRY = {"effective_rank": _effective_rank, "log_det": _log_det}


def _asked(loss: Any, name: str) -> Callable[..., Any]:
    found = getattr(loss, name, None)
    if not callable(found):
        raise ConfigError(
            f"this target asks the loss for {name}(...), which {type(loss).__name__} does not "
            "have; use a loss that has it, such as SeriesLoss of metagrad_filter.proxy."
        )
    return found


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name}={value!r}; expected a number in (0, 1).")


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value!r}; expected a positive number.")

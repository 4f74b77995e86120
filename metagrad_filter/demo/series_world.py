"""What a run on storms is made of: parts, targets, the base model, and how a model is judged.

Answers "on which windows is each thing done?". Storms are split into five parts that share none:
the base model trains on a mixture of the first, the stream is mixed from the second, the target and
the gate are the third and fourth, and every figure of a result is measured on the fifth. Classes
(usual, rare, corrupt) are known because the demo made the mixture; the filter never sees them.

Input is a `SeriesDemoConfig`, output a `SeriesWorld` and a `Proxy` in training. About a minute, for
the base model. Read next: `series_run.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np
import optax

from metagrad_filter.calibration.estimators.windows import losses_of
from metagrad_filter.demo.series_config import SHARES, SeriesDemoConfig
from metagrad_filter.demo.series_data import (
    NORMAL,
    RARE,
    WIND,
    StormWorld,
    Stream,
    Windows,
    build_storms,
    build_stream,
)
from metagrad_filter.demo.training import fresh_state, train
from metagrad_filter.proxy import Proxy, SeriesConfig, SeriesLoss, init_series
from metagrad_filter.series_targets import CalibrationGuard, EventError
from metagrad_filter.targets import GuardedTarget, HeldOutLoss
from metagrad_filter.types import Progress, PyTree, silent

LEVEL = 0.9
"""Probability that the judged intervals should hold."""

_MIXTURES = 3  # passes over one mixture that the base model makes
_JUDGED = 256  # windows of an evaluation


@dataclass(frozen=True, eq=False)
class SeriesWorld:
    """Windows by use, split by storm.

    Attributes:
      base: mixture that the base model is trained on.
      stream: what filters choose from.
      rare: windows with the event, the target's storms before the gate's.
      rapid: `(len(rare), T)` bool, their steps of rapid intensification.
      rare_gate: how many of `rare` are the gate's.
      normal: usual windows, in the same order.
      normal_gate: how many of `normal` are the gate's.
      report: windows that results are measured on, none of them broken.
    """

    base: Stream
    stream: Stream
    rare: np.ndarray
    rapid: np.ndarray
    rare_gate: int
    normal: np.ndarray
    normal_gate: int
    report: Windows

    def rare_target(self) -> EventError:
        """Squared error of the wind at rapid steps, which is what models are judged by."""
        gate_share = self.rare_gate / len(self.rare)
        return EventError(self.rare, self.rapid, channels=[WIND], gate_share=gate_share)

    def rare_loss(self) -> HeldOutLoss:
        """Mean loss on windows with the event, all that is predicted in them."""
        return HeldOutLoss(self.rare, gate_share=self.rare_gate / len(self.rare))

    def guard(self) -> CalibrationGuard:
        """Loss and coverage on usual windows."""
        return CalibrationGuard(
            self.normal, level=LEVEL, gate_share=self.normal_gate / len(self.normal)
        )

    def usual_loss(self) -> HeldOutLoss:
        """Mean loss on usual windows."""
        return HeldOutLoss(self.normal, gate_share=self.normal_gate / len(self.normal))

    def target(self, weight: float) -> GuardedTarget:
        """The rare event under two guards: loss of usual windows, and calibration on them.

        The loss has a weight in the labels; calibration is looked at by the gate alone, because the
        sign of what it asks for changes with the storms that it is measured on.
        """
        guards = {"usual": self.usual_loss(), "calibration": self.guard()}
        weights = {"usual": weight, "calibration": 0.0}
        return GuardedTarget(self.rare_target(), guards, weights=weights)


def series_world(config: SeriesDemoConfig, *, storms: StormWorld | None = None) -> SeriesWorld:
    """Splits and mixes.

    Args:
      config: sizes and seed.
      storms: with the parts of `SHARES`; None downloads and builds them.

    Raises:
      DataError: the storms cannot be downloaded or are damaged.
    """
    storms = storms or build_storms(length=config.length, shares=SHARES, seed=config.seed)
    parts = storms.parts

    def mixture(part: str, count: int, corrupt_share: float, offset: int) -> Stream:
        return build_stream(
            parts[part],
            count=count,
            rare_share=config.rare_share,
            corrupt_share=corrupt_share,
            seed=config.seed + offset,
        )

    wanted = -(-config.base_steps * config.batch_windows // _MIXTURES)
    normal, rare = (
        [parts[part].of_class(kind) for part in ("target", "gate")] for kind in (NORMAL, RARE)
    )
    return SeriesWorld(
        base=mixture("base", wanted, config.base_corrupt_share, 1),
        stream=mixture("stream", config.stream_windows, config.corrupt_share, 2),
        rare=np.concatenate([windows.values for windows in rare]),
        rapid=np.concatenate([windows.rapid for windows in rare]),
        rare_gate=len(rare[1]),
        # Every second one: neighbours overlap in all rows but one.
        normal=np.concatenate([windows.values[::2] for windows in normal]),
        normal_gate=len(normal[1].values[::2]),
        report=parts["report"],
    )


def series_base(
    world: SeriesWorld, config: SeriesDemoConfig, *, progress: Progress = silent
) -> Proxy:
    """Trains the base model on the unfiltered mixture; a proxy that stands at the live rate."""
    loss = SeriesLoss(model_config(config, world.report.values.shape[2]))
    factory = functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)
    steps, batch = config.base_steps, config.batch_windows
    rng = np.random.default_rng([config.seed, 0])
    values = world.base.windows.values
    order = np.concatenate([rng.permutation(len(values)) for _ in range(_MIXTURES)])
    windows = values[order[: steps * batch]]
    turns = [0, min(50, steps // 4), steps * 6 // 10, steps]
    peak = config.peak_learning_rate
    rates = np.interp(np.arange(steps), turns, [0.0, peak, peak, config.learning_rate])
    params, opt_state = train(
        loss,
        factory,
        rates.astype(np.float32),
        fresh_state(factory, init_series(loss.config, seed=config.seed)),
        windows.reshape(steps, batch, *windows.shape[1:]),
        progress=lambda done: progress("base model", done, steps),
    )
    return Proxy(loss, params, opt_state, factory, config.learning_rate)


def model_config(config: SeriesDemoConfig, channels: int) -> SeriesConfig:
    """Shape of the demo's patch transformer."""
    return SeriesConfig(
        channels=channels,
        patch=config.patch,
        max_patches=config.length // config.patch,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
    )


@dataclass(frozen=True)
class Judgement:
    """A model on the report's storms.

    Attributes:
      rare_error: mean squared error of the wind at rapid steps of rare windows, in squared
        standard deviations.
      normal_nll: mean loss of usual windows, nats a value.
      coverage: share of their values inside the 90 % interval.
    """

    rare_error: float
    normal_nll: float
    coverage: float


def judge(loss: SeriesLoss, params: PyTree, report: Windows) -> Judgement:
    """Measures a model on windows that no filter and no training has seen."""
    rare, normal = report.of_class(RARE), report.of_class(NORMAL)
    points, _, _, predicted = forecasts(loss, params, rare.values)
    at_event = rare.rapid & predicted[..., WIND]
    errors = np.square(points - rare.values)[..., WIND]
    _, lower, upper, predicted = forecasts(loss, params, normal.values)
    held = (normal.values > lower) & (normal.values < upper)
    return Judgement(
        rare_error=float(errors[at_event].mean(dtype=np.float64)),
        normal_nll=float(losses_of(loss, params, normal.values).mean(dtype=np.float64)),
        coverage=float(held[predicted].mean(dtype=np.float64)),
    )


def forecasts(
    loss: SeriesLoss, params: PyTree, windows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Median, bounds of the 90 % interval and where a value is predicted: each `(N, T, C)`."""
    found = []
    for start in range(0, len(windows), _JUDGED):
        index = np.minimum(np.arange(start, start + _JUDGED), len(windows) - 1)
        piece = _forecast(params, windows[index], loss=loss)
        found.append([np.asarray(x)[: len(windows) - start] for x in piece])
    points, lower, upper, predicted = (np.concatenate(parts) for parts in zip(*found))
    return points, lower, upper, predicted


@functools.partial(jax.jit, static_argnames="loss")
def _forecast(params, windows, *, loss):
    points, predicted = loss.points(params, windows)
    lower, upper, _ = loss.intervals(params, windows, LEVEL)
    return points, lower, upper, predicted

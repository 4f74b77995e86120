"""Are metagradients right for this model, at this horizon, batch size and learning rate?

Every check of `metagrad_filter.metagradient.checks` that needs no knowledge of the data runs at a
calibration's own configuration, each giving rows of value, expectation and verdict.

Cost, in inner trajectories (T gradients): about 30 for finite differences (twice that where the
first step in weight does not suit), 4 for each trajectory of the configuration, and two for each
half-subset of the retrainings, which is the most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
import optax

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.gate import draw
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.doctor.small_world import BATCH, VOCAB, small_world
from metagrad_filter.errors import ConfigError, NonFiniteMetagradient
from metagrad_filter.metagradient.adjoint import metagradients
from metagrad_filter.metagradient.checks import (
    FiniteDifferences,
    check_metagradients,
    compare_with_autodiff,
    retrain_on_subsets,
    split_half_reliability,
)
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.probe import score_with_probes
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.targets import HeldOutMetric
from metagrad_filter.types import Loss, Outer, Progress, PyTree, silent

ADJOINT_ERROR = 1e-4
RANK_CORRELATION = 0.99
RELATIVE_ERROR = 0.05
METASMOOTHNESS = 0.9

_AUTODIFF_STEPS = 16  # reverse mode through the loop keeps the state of every step
_ENTRIES = 12
# Steps in weight: a small one may drown in float32 rounding of the outer metric, a large one in
# curvature where batches are small. Agreement at either shows that the derivative is right.
_EPSILONS = (1.0, 0.3)
_SEEDS = 2


@dataclass(frozen=True)
class Row:
    """One line of the doctor's findings.

    Attributes:
      name: what was checked.
      value: what was seen; None where the check could not give a number.
      expected: what was expected of it.
      passed: the verdict.
      detail: what the value belongs to, or what to do where it did not pass.
    """

    name: str
    value: float | None
    expected: str
    passed: bool
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        seen = "no value" if self.value is None else f"{self.value:.4g}"
        return f"{self.name}: {seen}, expected {self.expected}; {self.detail}"


def examine_small_world(
    *, horizon: int = _AUTODIFF_STEPS, subsets: int = 24, progress: Progress = silent
) -> list[Row]:
    """Examines the built-in decoder; about a minute of processor time, half of it compilation."""
    progress("small world", 0, 1)
    world = small_world(count=4096)
    progress("small world", 1, 1)
    config = CalibrationConfig(
        horizon=horizon,
        trajectories=4,
        batch_windows=BATCH,
        learning_rate_scale=0.25,
        minimum_reliability=0.9,
        vocab_size=VOCAB,
    )
    source = WindowSource(world.windows)
    return examine(world.proxy, world.target, source, config, subsets=subsets, progress=progress)


def examine(
    proxy: Proxy,
    target: HeldOutMetric,
    source: WindowSource,
    config: CalibrationConfig,
    *,
    subsets: int = 24,
    progress: Progress = silent,
) -> list[Row]:
    """Runs the checks at a calibration's configuration.

    Args:
      proxy: the model at the point of training that is asked about.
      target: its differentiated part is the outer metric.
      source: raw windows; trajectories and retrainings draw from different halves of it.
      config: horizon, trajectories, batch_windows, learning_rate_scale, microbatch, seed and
        minimum_reliability are used.
      subsets: half-subsets of the linear datamodeling score.
      progress: called with stage name, done and total.

    Returns:
      A row for each expectation. A check that left the finite numbers gives a row that did not
      pass, so that the others still run.

    Raises:
      ConfigError: `subsets` is below 3, or the source is too small.
    """
    if subsets < 3:
        raise ConfigError(f"subsets={subsets}; expected at least 3, a rank correlation's.")
    if len(source) < 4 * config.batch_windows:
        raise ConfigError(
            f"the source holds {len(source)} windows; expected at least "
            f"{4 * config.batch_windows}, four batches: two for trajectories, two for halves."
        )
    subject = _Subject(proxy, target, source, config)
    stages: list[tuple[str, Callable[[], list[Row]]]] = [
        ("adjoint", lambda: _adjoint(subject)),
        ("finite differences", lambda: _finite_differences(subject)),
        ("reliability", lambda: _reliability(subject)),
        ("retraining", lambda: _datamodeling(subject, subsets, progress)),
    ]
    rows = []
    for name, stage in stages:
        progress(name, 0, 1)
        try:
            rows += stage()
        except NonFiniteMetagradient as error:
            rows.append(Row(name, None, "finite numbers", False, str(error)))
        progress(name, 1, 1)
    return rows


class _Subject:
    """What all stages share: the cooled optimizer, warm moments, and disjoint windows."""

    def __init__(
        self, proxy: Proxy, target: HeldOutMetric, source: WindowSource, config: CalibrationConfig
    ):
        self.proxy, self.source, self.config = proxy, source, config
        self.outer = target.outer(proxy.loss)
        self.optimizer = proxy.transformation(proxy.learning_rate * config.learning_rate_scales[0])
        self.state = warm_state(self.optimizer, proxy.params, proxy.opt_state)
        order = np.random.default_rng([config.seed, 0]).permutation(len(source))
        # As many as a trajectory draws: each half is then passed over twice.
        size = min(config.trajectory_windows, len(source) // 2)
        self.pool, self.rest = source.take(np.sort(order[:size])), order[size:]

    def batches(self, number: int, steps: int) -> np.ndarray:
        """`(steps, B, ...)` fresh windows outside the pool."""
        rng = np.random.default_rng([self.config.seed, 1, number])
        size = self.config.batch_windows
        windows = self.source.take(draw(rng, self.rest, steps * size))
        return windows.reshape(steps, size, *windows.shape[1:])

    @property
    def start(self) -> tuple[Loss, Outer, PyTree, PyTree]:
        return self.proxy.loss, self.outer, self.proxy.params, self.state

    @functools.cached_property
    def halves(self) -> np.ndarray:
        """`(2, N)` scores of the pool by the probes of two halves of the trajectories."""
        probes: list[list[Any]] = [[], []]
        for i in range(self.config.trajectories):
            found = metagradients(
                *self.start,
                self.batches(i, self.config.inner_steps),
                optimizer=self.optimizer,
                microbatch=self.config.microbatch,
            )
            probes[i % 2].append(found.probe)
        means = [jax.tree.map(lambda *x: sum(x) / len(x), *half) for half in probes]
        return score_with_probes(self.proxy.loss, self.proxy.params, means, self.pool)


def _adjoint(subject: _Subject) -> list[Row]:
    steps = min(subject.config.inner_steps, _AUTODIFF_STEPS)
    found = compare_with_autodiff(
        *subject.start,
        subject.batches(0, steps),
        optimizer=subject.optimizer,
        microbatch=subject.config.microbatch,
    )
    return [
        _row(
            "adjoint against autodiff, relative error",
            found.relative_error,
            most=ADJOINT_ERROR,
            where=f"{steps} steps",
            advice="use float32 or wider throughout, and look for custom derivatives in the loss",
        )
    ]


def _finite_differences(subject: _Subject) -> list[Row]:
    config = subject.config
    loss, outer, params, state = subject.start
    batches = subject.batches(0, config.inner_steps)
    best = None
    for epsilon in _EPSILONS:
        found = check_metagradients(
            loss,
            outer,
            params,
            state,
            batches,
            optimizer=subject.optimizer,
            entries=min(_ENTRIES, config.trajectory_windows),
            epsilon=epsilon,
            seed=config.seed,
            microbatch=config.microbatch,
        )
        if best is None or found.relative_error < best.relative_error:
            best = found
        if best.relative_error <= RELATIVE_ERROR and best.rank_correlation >= RANK_CORRELATION:
            break
    assert best is not None
    return _difference_rows(best, config)


def _difference_rows(found: FiniteDifferences, config: CalibrationConfig) -> list[Row]:
    steps = f"{config.inner_steps} steps"
    where = f"{len(found.entries)} windows, {steps}, epsilon {found.epsilon:g}"
    cooler = "lower learning_rate_scale or the horizon: the inner loop amplifies small changes"
    return [
        _row(
            "finite differences, rank correlation",
            found.rank_correlation,
            least=RANK_CORRELATION,
            where=where,
            advice=cooler,
        ),
        _row(
            "finite differences, relative error",
            found.relative_error,
            most=RELATIVE_ERROR,
            where=where,
            advice=cooler,
        ),
        _row(
            "metasmoothness",
            found.metasmoothness,
            least=METASMOOTHNESS,
            where=steps,
            advice=cooler,
        ),
    ]


def _reliability(subject: _Subject) -> list[Row]:
    first, second = subject.halves
    found = split_half_reliability(first, second)
    return [
        _row(
            "split-half reliability of the probe",
            found.half,
            least=subject.config.minimum_reliability,
            where=f"{subject.config.trajectories} trajectories, both halves together "
            f"{found.whole:.3f}",
            advice="raise trajectories or lower learning_rate_scale",
        )
    ]


def _datamodeling(subject: _Subject, subsets: int, progress: Progress) -> list[Row]:
    config, proxy = subject.config, subject.proxy
    # What a selection acts through: the live rate, falling so that short runs can be compared.
    rates = optax.linear_schedule(proxy.learning_rate, proxy.learning_rate / 10, config.inner_steps)
    optimizer = proxy.transformation(rates)
    truth = retrain_on_subsets(
        proxy.loss,
        subject.outer,
        proxy.params,
        warm_state(optimizer, proxy.params, proxy.opt_state),
        subject.pool,
        optimizer=optimizer,
        steps=config.inner_steps,
        batch_windows=config.batch_windows,
        subsets=subsets,
        seeds=_SEEDS,
        seed=config.seed,
        microbatch=config.microbatch,
        progress=lambda done, total: progress("retrainings", done, total),
    )
    found = truth.agreement(subject.halves.mean(axis=0), seed=config.seed)
    where = (
        f"{subsets} halves of {len(subject.pool)} windows, 95 % interval {found.low:.2f} to "
        f"{found.high:.2f}, ceiling {found.ceiling:.2f}"
    )
    passed = found.low > 0
    advice = "" if passed else "; raise subsets if the ceiling is high, otherwise the horizon"
    return [
        Row(
            "linear datamodeling score",
            found.rho,
            "> 0 with its 95 % interval",
            passed,
            where + advice,
        )
    ]


def _row(
    name: str,
    value: float,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    where: str,
    advice: str,
) -> Row:
    expected = f">= {least:g}" if math.isfinite(least) else f"<= {most:g}"
    passed = least <= value <= most
    detail = where if passed else f"{where}; {advice}"
    return Row(name, value if math.isfinite(value) else None, expected, passed, detail)

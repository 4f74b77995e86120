"""Trajectories -> one probe for each half of them -> scores; what several estimators share.

Trajectories start at the proxy's parameters from warm moments, take fresh batches of windows that
the caller draws, and run at the round's inner learning rate; the cotangent is averaged over all
insertion steps (see `metagradient/probe.py`). The halves differ in their trajectories *and* in the
target windows that they are measured on: labels learn the target's windows by heart as well, and
halves that share them agree on that. Their mean is the measurement on all of them. Where the
configuration names no inner learning rate, descending shares of the live one are tried with these
very trajectories, until the halves agree.

Cost: a step of a trajectory and its adjoint 3.66 gradients a window (1.66 more for each further
outer metric), a scored window .95 (with two halves 1.6), a gradient of the outer metric each.

References:
  Engstrom et al., 2025, https://arxiv.org/abs/2503.13751, section 3 (metagradients).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.calibration.estimators.task import (
    FORWARD_COST,
    PROBE_COST,
    SWEEP_COST,
    Estimate,
    Task,
    combined,
    naming,
)
from metagrad_filter.errors import NonFiniteMetagradient, TrajectoryDiverged
from metagrad_filter.labels import split_half_reliability
from metagrad_filter.metagradient.adjoint import metagradients
from metagrad_filter.metagradient.divergence import check_rise
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.probe import score_with_probes
from metagrad_filter.types import PyTree

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""`(rng, count) -> (count,)` positions in the source."""

_RELIABLE = 0.9  # split-half correlation at which no lower learning rate is tried
_TRIAL_WINDOWS = 512
_FURTHER_TARGET = 1.66  # of a sweep's cost, for each outer metric beyond the first


@dataclass(frozen=True)
class Probes:
    """Mean probes of the halves of the trajectories.

    Attributes:
      halves: two lists of K pytrees like params, K parts of the target.
      masked_coordinates, tape: as in `Estimate`.
    """

    halves: list[list[PyTree]]
    masked_coordinates: int = 0
    tape: str = ""


def probed(task: Task, draw: Draw, *, horizon: int, trajectories: int) -> Estimate:
    """Scores the task's windows with the probes of trajectories.

    Args:
      task: what to measure.
      draw: which windows of the source a trajectory takes.
      horizon: T, steps of a trajectory.
      trajectories: R, two or more; those of odd and of even number are the halves.

    Raises:
      NonFiniteMetagradient, TrajectoryDiverged: at the last learning rate that was tried too.
    """
    scales = task.config.learning_rate_scales
    best: tuple[float, float, Probes] | None = None
    tried: dict[float, float | None] = {}
    failure: Exception | None = None
    for scale in scales:
        try:
            with task.clock("trajectories"):
                probes = _averaged(task, draw, horizon, trajectories, scale)
                if len(scales) == 1:
                    best = (1.0, scale, probes)
                    break
                sample = score_halves(task, probes.halves, count=_TRIAL_WINDOWS)
        except (NonFiniteMetagradient, TrajectoryDiverged) as error:
            failure, tried[scale] = error, None
            continue
        reliability = split_half_reliability(combined(sample, task.target.weights))
        tried[scale] = reliability
        if best is None or reliability > best[0]:
            best = (reliability, scale, probes)
        if reliability >= _RELIABLE:
            break
    if best is None:
        assert failure is not None
        raise failure
    _, scale, probes = best
    with task.clock("labels"):
        halves = score_halves(
            task,
            probes.halves,
            progress=lambda done: task.progress("labels", done, len(task.windows)),
        )
    outers = len(task.target.parts)
    sweep = SWEEP_COST + _FURTHER_TARGET * (outers - 1)
    trajectory = horizon * task.config.batch_windows * sweep + task.target_count / 2
    rungs = max(1, len(tried))
    scored = len(task.windows) + len(tried) * min(_TRIAL_WINDOWS, len(task.windows))
    return Estimate(
        halves,
        independent=True,
        gradients=rungs * trajectories * trajectory + scored * scoring_cost(2 * outers),
        learning_rate_scale=scale,
        tried=tried,
        horizon=horizon,
        masked_coordinates=probes.masked_coordinates,
        tape=probes.tape,
    )


def scoring_cost(probes: int) -> float:
    """Window gradients that scoring a window with so many probes at once takes."""
    return FORWARD_COST + probes * (PROBE_COST - FORWARD_COST)


def score_halves(
    task: Task,
    halves: list[list[PyTree]],
    *,
    count: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """`(K, 2, n)` probe scores of the first `count` windows of a task, divided by its norms.

    Args:
      halves: two lists of K probes.
      count: None for all.
      progress: called with the number of windows done.
    """
    windows = task.windows[:count]
    with naming(task.positions, "scoring"):
        scores = score_with_probes(
            task.proxy.loss,
            task.proxy.params,
            [probe for half in halves for probe in half],
            windows,
            progress=progress,
        )
    scores = scores.reshape(2, -1, len(windows)).swapaxes(0, 1)
    return scores if task.norms is None else scores / task.norms[:count]


def _averaged(task: Task, draw: Draw, horizon: int, trajectories: int, scale: float) -> Probes:
    """Mean probe of each half of the trajectories, at one inner learning rate."""
    proxy, config, parts = task.proxy, task.config, task.target.parts
    optimizer = proxy.transformation(proxy.learning_rate * scale)
    start = warm_state(optimizer, proxy.params, proxy.opt_state)
    pairs = {name: part.halves(proxy.loss) for name, part in parts.items()}
    before = [float(jax.jit(outer)(proxy.params)) for outer in pairs["target"]]
    totals: list[list[PyTree] | None] = [None, None]
    masked, tape = 0, ""
    for i in range(trajectories):
        task.progress("trajectories", i, trajectories)
        # One generator a trajectory, so that every learning rate is tried on the same windows.
        rng = np.random.default_rng([*np.atleast_1d(task.seed), 1, i])
        index = draw(rng, horizon * config.batch_windows)
        windows = task.source.take(index)
        outers = {name: pair[i % 2] for name, pair in pairs.items()}
        outer = outers if len(outers) > 1 else outers["target"]
        batches = windows.reshape(horizon, config.batch_windows, *windows.shape[1:])
        with naming(index.reshape(horizon, -1), f"trajectory {i}"):
            result = metagradients(
                proxy.loss,
                outer,
                proxy.params,
                start,
                batches,
                optimizer=optimizer,
                microbatch=config.microbatch,
            )
            check_rise(
                proxy.loss,
                optimizer,
                (proxy.params, start),
                batches,
                jnp.ones(batches.shape[:2]),
                before=before[i % 2],
                after=float(result.phi["target"] if len(outers) > 1 else result.phi),
                most=config.maximum_rise,
                unit=getattr(proxy.loss, "unit", 0.0),
                microbatch=config.microbatch,
            )
        found = [result.probe[name] for name in outers] if len(outers) > 1 else [result.probe]
        total = totals[i % 2]
        totals[i % 2] = found if total is None else jax.tree.map(jnp.add, total, found)
        masked, tape = max(masked, result.masked_coordinates), str(result.tape)
    task.progress("trajectories", trajectories, trajectories)
    counts = (trajectories - trajectories // 2, trajectories // 2)
    halves = [jax.tree.map(lambda x, n=n: x / n, t) for t, n in zip(totals, counts)]
    return Probes(halves, masked, tape)  # pyright: ignore[reportArgumentType]

"""Where a trajectory diverged or left the finite numbers: looked for only after it did.

Cost: one more forward pass over the trajectory, which stops to look at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.errors import NonFiniteMetagradient, TrajectoryDiverged
from metagrad_filter.metagradient.optimizer import apply_update
from metagrad_filter.metagradient.sweep import Program, State, finite
from metagrad_filter.metagradient.trajectory import weighted_gradient
from metagrad_filter.types import Loss, PyTree


def explain(
    program: Program,
    state: State,
    batches: PyTree,
    weights: jax.Array,
    phi: Any,
    scores: Any,
    probe: PyTree,
) -> NonFiniteMetagradient:
    """The error that names the first step, and the windows of it, where something is not finite.

    Args:
      program: of the sweep that failed.
      state: where its trajectory started.
      batches, weights: its windows, `(T, B, ...)` and `(T, B)`.
      phi, scores, probe: what it yielded, with an axis of targets if `program.stacked`.
    """
    steps = _steps(program.loss, program.optimizer, program.microbatch, state, batches, weights)
    for step, (after, losses, gradients_finite) in enumerate(steps):
        bad = tuple(int(i) for i in np.flatnonzero(~np.isfinite(losses)))
        everyone = tuple(range(len(losses)))
        if bad == everyone and step:
            return NonFiniteMetagradient(
                f"the loss of every window is {losses[0]} at step {step}; the inner loop diverged: "
                "lower its learning rate, or look at the windows of the step before.",
                step=step - 1,
                windows=everyone,
            )
        if bad == everyone:
            return NonFiniteMetagradient(
                f"the loss of every window is {losses[0]} at the first step; look at the "
                "parameters that the trajectory starts from.",
                step=step,
                windows=everyone,
            )
        if bad:
            return NonFiniteMetagradient(
                f"the loss of window {_listed(bad)} is {losses[bad[0]]} at step {step} and that of "
                "other windows is finite; look at that window.",
                step=step,
                windows=bad,
            )
        if not gradients_finite:
            return NonFiniteMetagradient(
                f"the gradient is not finite at step {step} although every loss is; look at the "
                "windows of that batch, or lower the learning rate.",
                step=step,
                windows=everyone,
            )
        if not finite(after):
            return NonFiniteMetagradient(
                f"the optimizer's update is not finite at step {step} although its gradient is; "
                "lower its learning rate or raise its eps.",
                step=step,
                windows=everyone,
            )
    if not np.isfinite(np.asarray(phi)).all():
        return NonFiniteMetagradient(
            f"the outer metric is {np.asarray(phi)} at the end of a finite trajectory; look at its "
            "windows."
        )
    scores = np.asarray(scores)
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        step = int(bad[:, 0].max())
        windows = tuple(sorted({int(entry[-1]) for entry in bad if entry[0] == step}))
        return NonFiniteMetagradient(
            f"{len(bad)} of {scores.size} scores are not finite, the last at step {step}, window "
            f"{_listed(windows)}, although the trajectory is; look at that batch (a gradient of "
            "exactly zero has no derivative under clipping by norm), or add eps_root to the "
            "optimizer.",
            step=step,
            windows=windows,
        )
    places = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(probe)
        if not bool(jnp.isfinite(leaf).all())
    ]
    return NonFiniteMetagradient(
        f"the probe is not finite in params{', params'.join(places)} although trajectory and "
        "scores are; add eps_root to the optimizer."
    )


def check_rise(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: State,
    batches: PyTree,
    weights: jax.Array,
    *,
    before: float,
    after: float,
    most: float,
    unit: float = 0.0,
    microbatch: int | None = None,
) -> None:
    """Refuses a trajectory at whose end the outer metric has risen by more than a share.

    Args:
      loss, optimizer, state, batches, weights, microbatch: of the trajectory.
      before, after: the outer metric at its start and at its end.
      most: share of `before` by which it may rise.
      unit: least magnitude of `before` that a share is taken of; losses that cross zero, such as
        the nats of a density, have one (`loss.unit`).

    Raises:
      TrajectoryDiverged: it rose by more; names the step after which the windows' loss jumped.
    """
    if after <= before + most * max(abs(before), unit):
        return
    steps = list(_steps(loss, optimizer, microbatch, state, batches, weights))
    losses = np.stack([losses for _, losses, _ in steps])
    mean = losses.mean(axis=1)
    step = int(np.argmax(np.diff(mean))) if len(mean) > 1 else 0
    raise TrajectoryDiverged(
        f"the outer metric rose from {before:.4g} to {after:.4g} over the trajectory, more than "
        f"the {most:.0%} that maximum_rise allows; the loss of its windows goes from {mean[0]:.4g} "
        f"to {mean[-1]:.4g} and rises most after step {step}: lower learning_rate_scale, or look "
        "at the windows of that step.",
        step=step,
        windows=tuple(int(i) for i in np.argsort(-losses[step], kind="stable")),
    )


def _steps(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    microbatch: int | None,
    state: State,
    batches: PyTree,
    weights: jax.Array,
) -> Iterator[tuple[State, np.ndarray, bool]]:
    """Per step: the state after it, its losses `(B,)`, and whether its gradient is finite."""

    @jax.jit
    def look(state: State, batch: PyTree, w: jax.Array):
        params, opt_state = state
        gradient = weighted_gradient(loss, params, batch, w, microbatch)
        after = apply_update(optimizer, params, opt_state, gradient)
        return after, loss(params, batch), finite(gradient)

    for step, w in enumerate(weights):
        batch = jax.tree.map(lambda x, t=step: x[t], batches)
        state, losses, whole = look(state, batch, w)
        yield state, np.asarray(losses), bool(whole)


def _listed(windows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, windows[:8]))
    return shown if len(windows) <= 8 else f"{shown}, ... ({len(windows)} of them)"

"""Where a trajectory or its adjoint left the finite numbers: looked for only after it did.

Cost: one more forward pass over the trajectory, which stops to look at every step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.errors import NonFiniteMetagradient
from metagrad_filter.metagradient.optimizer import apply_update
from metagrad_filter.metagradient.sweep import Program, State, finite
from metagrad_filter.metagradient.trajectory import weighted_gradient
from metagrad_filter.types import PyTree


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
    look = jax.jit(_look, static_argnames="program")
    for step in range(len(weights)):
        batch = jax.tree.map(lambda x, t=step: x[t], batches)
        state, losses, gradients_finite = look(state, batch, weights[step], program=program)
        losses = np.asarray(losses)
        bad = tuple(int(i) for i in np.flatnonzero(~np.isfinite(losses)))
        if len(bad) == len(losses):
            return NonFiniteMetagradient(
                f"the loss of every window is {losses[0]} at step {step}; the inner loop diverged: "
                "lower its learning rate, or look at the parameters that it starts from.",
                step=step,
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
                windows=tuple(range(len(losses))),
            )
        if not all(finite(state)):
            return NonFiniteMetagradient(
                f"the optimizer's update is not finite at step {step} although its gradient is; "
                "lower its learning rate or raise its eps.",
                step=step,
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


def _look(state: State, batch: PyTree, weights: jax.Array, *, program: Program):
    params, opt_state = state
    losses = program.loss(params, batch)
    gradient = weighted_gradient(program.loss, params, batch, weights, program.microbatch)
    whole = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradient)]).all()
    return apply_update(program.optimizer, params, opt_state, gradient), losses, whole


def _listed(windows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, windows[:8]))
    return shown if len(windows) <= 8 else f"{shown}, ... ({len(windows)} of them)"

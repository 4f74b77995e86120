"""RHO-loss: what a window has left to teach that the target has taught already.

What is computed: `score = loss(window; live) - loss(window; reference)`, the reference being the
live model tuned on target windows. Two references, each tuned on one half of the target part, are
the halves; the other half says when tuning stops (every 16 steps of B windows at a quarter of the
live learning rate and warm moments, at most 128), for a reference that has memorised its few
windows makes RHO-loss look worse than it is.

Where it deviates from the paper: the reference starts from the live model instead of from nothing
and sees the target's few windows, and scores label windows once a round, not at each step.

Cost: a forward pass a window and reference, and one more; at most 256 gradients of a batch.

References:
  Mindermann et al., 2022, https://arxiv.org/abs/2206.07137, equation 3 (reducible hold-out loss).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.calibration.estimators.one_step import halves_differ
from metagrad_filter.calibration.estimators.task import FORWARD_COST, Estimate, Task, naming
from metagrad_filter.calibration.estimators.windows import finite_scores, losses_of
from metagrad_filter.metagradient.diagnostics.retraining import passes_over
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.types import PyTree

CHUNK, MOST_STEPS = 16, 128
TUNING_SCALE = 0.25  # of the live learning rate


class Reference(NamedTuple):
    """A model tuned on target windows.

    Attributes:
      params: its parameters.
      steps: at which its loss on the judging windows was lowest; 0 is the live model.
      taken: steps that were tried.
    """

    params: PyTree
    steps: int
    taken: int


def rho_loss(task: Task) -> Estimate:
    """Scores windows by the live loss minus the loss of a model tuned on the target."""
    proxy, config = task.proxy, task.config
    count, cost = len(task.windows), FORWARD_COST * len(task.windows)
    with task.clock("labels"), naming(task.positions, "scoring"):
        live = losses_of(proxy.loss, proxy.params, task.windows)
        found = []
        for k, part in enumerate(task.target.parts.values()):
            windows = part.target_windows
            cut = len(windows) // 2
            sides = (windows[:cut], windows[cut:]) if cut else (windows, windows)
            halves = []
            for i in (0, 1):
                task.progress("labels", (2 * k + i) * count, 2 * len(task.target.parts) * count)
                tuned = tuned_reference(
                    proxy,
                    sides[i],
                    sides[1 - i],
                    batch_windows=config.batch_windows,
                    rng=np.random.default_rng([*np.atleast_1d(task.seed), 3, k, i]),
                )
                halves.append(live - losses_of(proxy.loss, tuned.params, task.windows))
                judged = FORWARD_COST * len(sides[1 - i]) * (1 + tuned.taken / CHUNK)
                cost += tuned.taken * config.batch_windows + judged + FORWARD_COST * count
            found.append(finite_scores(np.stack(halves), "reducible losses"))
        total = 2 * len(found) * count
        task.progress("labels", total, total)
    return Estimate(np.stack(found), independent=halves_differ(task), gradients=cost)


def tuned_reference(
    proxy: Proxy,
    windows: np.ndarray,
    judge: np.ndarray,
    *,
    batch_windows: int,
    rng: np.random.Generator,
    most_steps: int = MOST_STEPS,
) -> Reference:
    """Tunes the live model on target windows, as long as it improves on others.

    Args:
      proxy: the live model, with warm moments.
      windows: `(n, ...)` to tune on.
      judge: `(m, ...)` to stop by.
      batch_windows: B.
      rng: of the order.
      most_steps: at which tuning ends, in chunks of 16.
    """
    optimizer = proxy.transformation(proxy.learning_rate * TUNING_SCALE)
    params, state = proxy.params, warm_state(optimizer, proxy.params, proxy.opt_state)
    best = Reference(params, 0, 0)
    lowest = float(losses_of(proxy.loss, params, judge).mean(dtype=np.float64))
    taken = 0
    while taken < most_steps:
        rows = passes_over(rng, np.arange(len(windows)), CHUNK * batch_windows)
        batches = windows[rows].reshape(CHUNK, batch_windows, *windows.shape[1:])
        params, state = _tuned(params, state, batches, loss=proxy.loss, optimizer=optimizer)
        taken += CHUNK
        found = float(losses_of(proxy.loss, params, judge).mean(dtype=np.float64))
        if not found < lowest:
            break
        best, lowest = Reference(params, taken, taken), found
    return best._replace(taken=taken)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _tuned(params, state, batches, *, loss, optimizer: optax.GradientTransformation):
    weights = jnp.ones(batches.shape[:2], jnp.float32)
    return run(loss, optimizer, params, state, batches, weights)[:2]

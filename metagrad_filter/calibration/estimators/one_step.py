"""One gradient step: how far a window's gradient points where the outer metric's does.

What is computed: `score = <grad Phi, grad loss(window)>` at the live parameters, which is -dPhi/dw
through one step of plain gradient descent, up to its learning rate. The halves take the gradient of
Phi on one half of its windows each; nothing else is random.

Where it deviates from the estimator of record: one step, no moments, no preconditioning, no batch.

Cost: one gradient of the outer metric, and a probe score a window.

References:
  Pruthi et al., 2020, https://arxiv.org/abs/2002.08484, equation 1 (TracIn, one checkpoint).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from metagrad_filter.calibration.estimators.probing import score_halves, scoring_cost
from metagrad_filter.calibration.estimators.task import Estimate, Task
from metagrad_filter.types import Outer, PyTree


def one_step(task: Task) -> Estimate:
    """Scores windows by the product of their gradient with the outer metric's."""
    with task.clock("labels"):
        halves = score_halves(
            task,
            [[jax.tree.map(jnp.negative, g) for g in half] for half in target_gradients(task)],
            progress=lambda done: task.progress("labels", done, len(task.windows)),
        )
    probes = 2 * len(task.target.parts)
    return Estimate(
        halves,
        independent=halves_differ(task),
        gradients=task.target_count + len(task.windows) * scoring_cost(probes),
    )


def target_gradients(task: Task) -> list[list[PyTree]]:
    """Gradients at the live parameters: for each half of the target's windows, one a part."""
    pairs = [part.halves(task.proxy.loss) for part in task.target.parts.values()]
    return [[_gradient(task.proxy.params, outer=pair[half]) for pair in pairs] for half in (0, 1)]


def halves_differ(task: Task) -> bool:
    """Whether the target's halves hold different windows."""
    return all(len(part.target_windows) > 1 for part in task.target.parts.values())


@functools.partial(jax.jit, static_argnames="outer")
def _gradient(params: PyTree, *, outer: Outer) -> PyTree:
    return jax.grad(outer)(params)

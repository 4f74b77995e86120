"""LESS: the cosine between a window's optimizer update and the target's gradient.

What is computed: `score = cos(grad Phi, Gamma)`, where `-Gamma` is the update that the live
optimizer, with its live moments and step count, would make of this window's gradient alone. For
Adam that is `m' / (sqrt(v') + eps)` after bias correction. The halves take the gradient of Phi on
one half of its windows each.

Where it deviates from the paper: one checkpoint instead of a weighted sum over those of a warm-up
run, full gradients instead of random projections of LoRA ones, and one target gradient instead of
the maximum over subtasks. Decoupled weight decay, which is the same for every window, is left out:
the update is evaluated at parameters of zero.

Cost: one gradient of the outer metric, a gradient and an optimizer update a window, and as many
gradients in memory as `microbatch` (32 where that is None).

References:
  Xia et al., 2024, https://arxiv.org/abs/2402.04333, definition 3.1 (Adam influence).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.calibration.estimators.one_step import halves_differ, target_gradients
from metagrad_filter.calibration.estimators.task import Estimate, Task, naming
from metagrad_filter.calibration.estimators.windows import finite_scores, in_chunks
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.trajectory import window_losses
from metagrad_filter.types import PyTree

_GRADIENTS = 32


def less(task: Task) -> Estimate:
    """Scores windows by the cosine of their preconditioned update with the target's gradient."""
    proxy = task.proxy
    optimizer = proxy.transformation(proxy.learning_rate)
    state = warm_state(optimizer, proxy.params, proxy.opt_state)
    with task.clock("labels"):
        # (2, K) gradients in one pytree with that leading axis.
        gradients = [g for half in target_gradients(task) for g in half]
        queries = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
        found = in_chunks(
            functools.partial(
                _cosines, proxy.params, state, queries, loss=proxy.loss, optimizer=optimizer
            ),
            task.windows,
            task.config.microbatch or _GRADIENTS,
            lambda done: task.progress("labels", done, len(task.windows)),
        )
        with naming(task.positions, "scoring"):
            scores = finite_scores(found, "cosines")
    return Estimate(
        np.ascontiguousarray(scores.reshape(2, -1, len(task.windows)).swapaxes(0, 1)),
        independent=halves_differ(task),
        gradients=task.target_count + len(task.windows),
    )


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _cosines(params, opt_state, queries, windows, *, loss, optimizer):
    nothing = jax.tree.map(jnp.zeros_like, params)

    def of_window(window):
        gradient = jax.grad(lambda p: window_losses(loss, p, window[None], 1)[0])(params)
        update = optimizer.update(gradient, opt_state, nothing)[0]
        return jax.tree.map(jnp.negative, update)

    def cosine(query: PyTree, update: PyTree) -> jax.Array:
        norms = jnp.sqrt(_product(query, query) * _product(update, update))
        return jnp.where(norms > 0, _product(query, update) / jnp.where(norms > 0, norms, 1), 0)

    updates = jax.vmap(of_window)(windows)
    return jax.vmap(lambda query: jax.vmap(functools.partial(cosine, query))(updates))(queries)


def _product(a: PyTree, b: PyTree) -> jax.Array:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return sum((jnp.sum(x.astype(jnp.float32) * y) for x, y in pairs), jnp.float32(0))

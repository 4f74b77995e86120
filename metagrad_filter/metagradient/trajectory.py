"""The inner loop: T optimizer steps of the proxy, each on a fresh batch with weighted windows.

Step t minimises `sum_i w_ti loss_i / B`. Everything here is a pure function of arrays meant to be
called inside `jax.jit`; many steps run inside one `lax.scan`, which on CPU is two to three times
faster than one jitted call a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.optimizer import apply_update
from metagrad_filter.types import Loss, PyTree


class Tape(NamedTuple):
    """What one step leaves behind for the backward sweep; stacked over steps."""

    params: PyTree  # before the step
    opt_state: PyTree  # before the step
    gradient: PyTree  # of the weighted loss at `params`


def in_pieces(batch: PyTree, weights: jax.Array, microbatch: int | None):
    """Cuts `(B, ...)` arrays into `(pieces, microbatch, ...)`; the last piece is padded.

    Padding repeats the first windows with weight zero, so sums do not change.
    """
    size = weights.shape[0]
    step = size if microbatch is None else min(microbatch, size)
    padding = -size % step

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.concatenate([x, x[:padding]]) if padding else x
        return padded.reshape(-1, step, *x.shape[1:])

    padded = jnp.concatenate([weights, jnp.zeros(padding, weights.dtype)]) if padding else weights
    return jax.tree.map(cut, batch), padded.reshape(-1, step)


def window_losses(loss: Loss, params: PyTree, batch: PyTree, count: int) -> jax.Array:
    """Losses `(count,)` of a batch; raises `ConfigError` where `loss` returns another shape."""
    losses = loss(params, batch)
    if jnp.shape(losses) != (count,):
        # A mean over the batch would broadcast, and train as if nothing were wrong.
        raise ConfigError(
            f"loss(params, batch) returned shape {jnp.shape(losses)} for a batch of {count} "
            f"windows; expected {(count,)}, the loss of each window."
        )
    return losses


def weighted_gradient(
    loss: Loss, params: PyTree, batch: PyTree, weights: jax.Array, microbatch: int | None
) -> PyTree:
    """Gradient of `sum_i w_i loss_i / B` with at most `microbatch` windows at a time."""
    size = weights.shape[0]

    def objective(p: PyTree, x: PyTree, w: jax.Array) -> jax.Array:
        return jnp.sum(w * window_losses(loss, p, x, w.shape[0])) / size

    gradient = jax.grad(objective)
    if microbatch is None or microbatch >= size:
        return gradient(params, batch, weights)

    def accumulate(total, piece):
        return jax.tree.map(jnp.add, total, gradient(params, *piece)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(accumulate, zeros, in_pieces(batch, weights, microbatch))[0]


def run(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    batches: PyTree,
    weights: jax.Array,
    *,
    microbatch: int | None = None,
    gradients: PyTree | None = None,
    record: Callable[[Tape], Any] | None = None,
) -> tuple[PyTree, PyTree, Any]:
    """Runs the steps of `batches`.

    Args:
      batches: pytree of arrays with leading axes `(T, B, ...)`.
      weights: `(T, B)` loss weights.
      gradients: recorded gradients stacked over steps; given, the steps are replayed without any
        evaluation of the model.
      record: what each step leaves behind, as a function of its `Tape`; None keeps nothing.

    Returns:
      Parameters and state after the last step, and the records stacked over steps.
    """

    def step(carry, inputs):
        params, opt_state = carry
        batch, w, gradient = inputs
        if gradients is None:
            gradient = weighted_gradient(loss, params, batch, w, microbatch)
        kept = None if record is None else record(Tape(params, opt_state, gradient))
        return apply_update(optimizer, params, opt_state, gradient), kept

    (params, opt_state), kept = jax.lax.scan(
        step, (params, opt_state), (batches, weights, gradients)
    )
    return params, opt_state, kept

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
from metagrad_filter.metagradient.optimizer import apply_update, widened
from metagrad_filter.types import Loss, PyTree


class Step(NamedTuple):
    """One optimizer step, as it is seen by what `run` records."""

    params: PyTree  # before the step
    opt_state: PyTree  # before the step
    gradient: PyTree  # of the weighted loss at `params`


def in_pieces(batch: PyTree, weights: jax.Array, microbatch: int | None):
    """Cuts `(B, ...)` arrays into `(pieces, microbatch, ...)`, padded with windows of weight zero.

    Piece j takes windows j, j + pieces, j + 2 pieces, ...: where the batch lies on several devices,
    every piece does too.
    """
    size = weights.shape[0]
    step = size if microbatch is None else min(microbatch, size)
    pieces = -(-size // step)
    padding = pieces * step - size

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.concatenate([x, x[:padding]]) if padding else x
        return jnp.swapaxes(padded.reshape(step, pieces, *x.shape[1:]), 0, 1)

    padded = jnp.concatenate([weights, jnp.zeros(padding, weights.dtype)]) if padding else weights
    return jax.tree.map(cut, batch), jnp.swapaxes(padded.reshape(step, pieces), 0, 1)


def from_pieces(values: jax.Array, size: int) -> jax.Array:
    """Undoes `in_pieces` for values `(pieces, ..., microbatch)`: returns `(..., size)`."""
    values = jnp.moveaxis(values, 0, -1)
    return values.reshape(*values.shape[:-2], -1)[..., :size]


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
    """Gradient of `sum_i w_i loss_i / B` with at most `microbatch` windows at a time.

    Pieces are summed in float32 or wider, whatever the dtype of the parameters.
    """
    size = weights.shape[0]

    def objective(p: PyTree, x: PyTree, w: jax.Array) -> jax.Array:
        return jnp.sum(w * window_losses(loss, p, x, w.shape[0])) / size

    gradient = jax.grad(objective)
    if microbatch is None or microbatch >= size:
        return gradient(params, batch, weights)

    def accumulate(total, piece):
        return jax.tree.map(jnp.add, total, gradient(params, *piece)), None

    zeros = jax.tree.map(jnp.zeros_like, widened(params))
    total, _ = jax.lax.scan(accumulate, zeros, in_pieces(batch, weights, microbatch))
    return jax.tree.map(lambda g, p: g.astype(p.dtype), total, params)


def run(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    batches: PyTree,
    weights: jax.Array,
    *,
    microbatch: int | None = None,
    active: jax.Array | None = None,
    record: Callable[[Step], Any] | None = None,
) -> tuple[PyTree, PyTree, Any]:
    """Runs the steps of `batches`.

    Args:
      batches: pytree of arrays with leading axes `(T, B, ...)`.
      weights: `(T, B)` loss weights.
      microbatch: windows per gradient evaluation.
      active: `(T,)` bool, steps that are taken; the others cost nothing. None takes all.
      record: what each step leaves behind, as a function of its `Step`; None keeps nothing. A step
        that is not taken leaves zeros.

    Returns:
      Parameters and state after the last step, and the records stacked over steps.
    """

    def step(state, inputs):
        params, opt_state = state
        batch, w = inputs
        gradient = weighted_gradient(loss, params, batch, w, microbatch)
        kept = None if record is None else record(Step(params, opt_state, gradient))
        return apply_update(optimizer, params, opt_state, gradient), kept

    state, kept = jax.lax.scan(
        skipping(step, active is not None),
        (params, opt_state),
        (batches, weights) if active is None else (active, (batches, weights)),
    )
    return *state, kept


def skipping(step: Callable[..., Any], skips: bool) -> Any:
    """A scan body over `(active, inputs)` that leaves the carry alone where `active` is false."""
    if not skips:
        return step

    def guarded(carry, inputs):
        active, inputs = inputs
        kept = jax.eval_shape(step, carry, inputs)[1]

        def skip(carry, inputs):
            del inputs
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)

        return jax.lax.cond(active, step, skip, carry, inputs)

    return guarded

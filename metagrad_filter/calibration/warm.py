"""Optimizer moments for a job that kept its weights only.

Input: loss, parameters, optimizer and batches of the raw stream. Output: an optimizer state as if
training had stood at these parameters for that many steps. The parameters do not move, so the
moments are averages of gradients at exactly the point that is measured; step counts advance, and
Adam's bias correction makes the short averages unbiased. Scores of a trajectory that starts cold
sum to zero whatever the data are worth, hence this file.

Cost: one gradient a step, without tape; no Hessian, no outer metric.

References:
  Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980, section 3 (bias correction).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, WindowError
from metagrad_filter.metagradient.optimizer import owners, split_floats
from metagrad_filter.metagradient.trajectory import weighted_gradient
from metagrad_filter.types import Loss, PyTree

MAX_WARMUP_STEPS = 64


def warm_moments(
    loss: Loss,
    params: PyTree,
    batches: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    microbatch: int | None = None,
) -> PyTree:
    """Runs the optimizer on fresh batches and keeps its state, not its updates.

    Args:
      loss: `loss(params, batch) -> (B,)`.
      params: where training stands; what comes back belongs to these very parameters.
      batches: pytree of arrays with leading axes `(S, B, ...)`, fresh windows of the raw stream;
        for S see `warmup_steps`.
      optimizer: the transformation of the live training.
      microbatch: windows per gradient evaluation, None for all.

    Returns:
      A state of `optimizer` after S steps, for `metagradients` or `Proxy`.

    Raises:
      WindowError: `batches` have no leading axes `(S, B)`.
      ConfigError: `microbatch` is not a positive integer or None.
      NonFiniteMetagradient: a gradient at `params` is not finite.
    """
    axes = {np.shape(x)[:2] for x in jax.tree.leaves(batches)}
    if len(axes) != 1 or len(lead := next(iter(axes))) != 2 or 0 in lead:
        raise WindowError(
            f"batches have the leading axes {sorted(axes)}; expected the same non-empty (S, B) in "
            "every array: one batch of B windows for each of S steps."
        )
    if microbatch is not None and not (type(microbatch) is int and microbatch >= 1):
        raise ConfigError(f"microbatch={microbatch!r}; expected a positive int or None.")
    state, finite = _warm(
        params, batches, loss=loss, optimizer=optimizer, size=lead[1], microbatch=microbatch
    )
    if not finite:
        raise NonFiniteMetagradient(
            f"moments warmed on {lead[0]} batches are not finite; check the parameters and the "
            "windows of the source."
        )
    return state


def warmup_steps(params: PyTree, optimizer: optax.GradientTransformation) -> int:
    """How many steps warm an optimizer: `2 / (1 - b)` of its slowest moment, at most 64.

    That is how many gradients an exponential average of decay `b` holds in effect: 40 for
    `b2=0.95`. Slower ones stop at 64: bias correction makes the average of 64 gradients unbiased,
    and the trajectory goes on averaging. `b` is read off one update, as the slope of the new moment
    in the old one, so that no optimizer has to be known by name. 1 where nothing decays.
    """
    decays = np.asarray(_decays(params, optimizer=optimizer))
    decays = decays[np.isfinite(decays) & (decays > 0) & (decays < 1)]
    if not len(decays):
        return 1
    # Rounded, for .95 in float32 would be 41 steps.
    return min(MAX_WARMUP_STEPS, math.ceil(round(2 / (1 - float(decays.max())), 3)))


@functools.partial(jax.jit, static_argnames=("loss", "optimizer", "size", "microbatch"))
def _warm(params, batches, *, loss, optimizer, size, microbatch):
    weights = jnp.ones(size, jnp.result_type(*jax.tree.leaves(params)))

    def step(state, batch):
        gradient = weighted_gradient(loss, params, batch, weights, microbatch)
        return optimizer.update(gradient, state, params)[1], None

    state, _ = jax.lax.scan(step, optimizer.init(params), batches)
    finite = [jnp.isfinite(x).all() for x in split_floats(state)[0]]
    return state, jnp.all(jnp.array(finite))


@functools.partial(jax.jit, static_argnames="optimizer")
def _decays(params, *, optimizer) -> jax.Array:
    """Slope of each moment in its own past, in the mean over its coordinates."""
    cold = optimizer.init(params)
    floats, join = split_floats(cold)
    gradient = jax.tree.map(jnp.ones_like, params)

    def step(floats):
        return split_floats(optimizer.update(gradient, join(floats), params)[1])[0]

    # A scalar without an owner is no moment but an injected hyperparameter.
    moment = [owner >= 0 or f.ndim > 0 for owner, f in zip(owners(params, cold), floats)]
    ones = [jnp.full_like(f, m) for f, m in zip(floats, moment)]
    _, slopes = jax.jvp(step, (floats,), (ones,))
    return jnp.array([jnp.mean(s) for s, m in zip(slopes, moment) if m])

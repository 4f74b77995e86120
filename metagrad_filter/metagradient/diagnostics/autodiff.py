"""Is the adjoint the derivative of this inner loop? jax differentiates the loop as a whole.

Input is a trajectory, output the relative error of its scores. Autodiff here knows nothing of the
adjoint: it runs the steps inside one scan and takes the reverse of it all.

Cost: about five gradients a step beside the sweep; memory three copies of the parameters a step
(moments included) and one step's activations, so keep the trajectory short for large models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient
from metagrad_filter.metagradient.adjoint import metagradients
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.types import Loss, Outer, PyTree

# The reverse of a root at exactly zero is inf * 0; a moment this small moves no update.
_LEAST_MOMENT = 1e-30


@dataclass(frozen=True)
class AutodiffComparison:
    """Scores of one trajectory, twice.

    Attributes:
      adjoint: `(T, B)` by the adjoint.
      autodiff: `(T, B)` by `jax.grad` through the loop.
      relative_error: L2 norm of the difference over that of `autodiff`.
    """

    adjoint: np.ndarray
    autodiff: np.ndarray
    relative_error: float


def compare_with_autodiff(
    loss: Loss,
    outer: Outer,
    params: PyTree,
    opt_state: PyTree,
    batches: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    weights: Any = None,
    microbatch: int | None = None,
) -> AutodiffComparison:
    """Compares `metagradients` with reverse-mode autodiff through the whole inner loop.

    Both start from `opt_state` with its exact zeros raised to 1e-30: plain autodiff gives NaN for
    moments that are zero, which is why the adjoint has a rule for them.

    Args:
      loss, outer, params, opt_state, batches, optimizer, weights, microbatch: as for
        `metagradients`, with one outer metric.

    Raises:
      ConfigError: `outer` is a dict.
      NonFiniteMetagradient: autodiff gave a number that is not finite; names how many.
    """
    if not callable(outer):
        raise ConfigError("compare_with_autodiff takes one outer metric; pass one of the dict.")
    opt_state = jax.tree.map(_raised, opt_state)
    found = metagradients(
        loss,
        outer,
        params,
        opt_state,
        batches,
        optimizer=optimizer,
        weights=weights,
        microbatch=microbatch,
    )
    adjoint = np.asarray(found.scores)
    base = jnp.ones(adjoint.shape, adjoint.dtype) if weights is None else jnp.asarray(weights)
    slopes = _through_the_loop(
        base,
        params,
        opt_state,
        batches,
        loss=loss,
        outer=outer,
        optimizer=optimizer,
        microbatch=microbatch,
    )
    autodiff = -np.asarray(slopes)
    bad = int(np.sum(~np.isfinite(autodiff)))
    if bad:
        raise NonFiniteMetagradient(
            f"autodiff through the loop gives {bad} of {autodiff.size} scores that are not finite; "
            "the model has a derivative that is infinite on these windows, so its adjoint cannot "
            "be compared: look for roots, norms or logarithms at zero."
        )
    norm = np.linalg.norm(autodiff.astype(np.float64))
    error = np.linalg.norm(adjoint.astype(np.float64) - autodiff) / max(norm, 1e-300)
    return AutodiffComparison(adjoint, autodiff, float(error))


def _raised(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.where(leaf == 0, jnp.asarray(_LEAST_MOMENT, leaf.dtype), leaf)


@functools.partial(jax.jit, static_argnames=("loss", "outer", "optimizer", "microbatch"))
def _through_the_loop(weights, params, opt_state, batches, *, loss, outer, optimizer, microbatch):
    @jax.checkpoint
    def step(state, inputs):
        params, opt_state = state
        batch, w = jax.tree.map(lambda x: x[None], inputs)
        new = run(loss, optimizer, params, opt_state, batch, w, microbatch=microbatch)
        return new[:2], None

    def objective(weights):
        (end, _), _ = jax.lax.scan(step, (params, opt_state), (batches, weights))
        return outer(end)

    return jax.grad(objective)(weights)

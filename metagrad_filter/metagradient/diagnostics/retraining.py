"""Retraining on chosen windows of a pool, many runs in one compiled program.

Input is a pool and, for each run, which of its windows every step takes; output is the outer metric
at the end of each run. Cost: one gradient a step, one evaluation of the outer metric a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, WindowError
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.types import Loss, Outer, PyTree

_RUNS_PER_CALL = 16


def pool_size(pool: PyTree) -> int:
    """N of a pytree of arrays with a leading axis `N`; `WindowError` where they disagree."""
    sizes = {int(np.shape(x)[0]) if np.ndim(x) else -1 for x in jax.tree.leaves(pool)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise WindowError(
            f"the pool has the leading sizes {sorted(sizes)}; expected the same N >= 2 in every "
            "array, one row a window."
        )
    return sizes.pop()


def check_positive(**values: int) -> None:
    """Raises `ConfigError` for the first value that is no positive integer."""
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (whole and value >= 1):
            raise ConfigError(f"{name}={value!r}; expected a positive integer.")


def passes_over(rng: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    """`count` entries of `rows` in random order, each as often as any other (+- 1)."""
    rounds = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:count]


def outer_after_training(
    loss: Loss,
    outer: Outer,
    params: PyTree,
    opt_state: PyTree,
    pool: PyTree,
    rows: np.ndarray,
    *,
    optimizer: optax.GradientTransformation,
    microbatch: int | None = None,
    parallel: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The outer metric after each run, `(runs,)` float64.

    Args:
      rows: `(runs, T, B)` positions in the pool.
      parallel: runs that are evaluated side by side; memory grows with it. Worth 4 to 16 for
        models whose operations are too small to fill the machine.
      progress: called with runs done and in total.

    Raises:
      ConfigError: `outer` is a dict, or `parallel` is not positive.
      NonFiniteMetagradient: a run diverged.
    """
    if not callable(outer):
        raise ConfigError("retraining measures one outer metric; pass one of the dict.")
    check_positive(parallel=parallel)
    size = min(len(rows), -(-_RUNS_PER_CALL // parallel) * parallel)
    pool = jax.tree.map(jnp.asarray, pool)
    phi = np.empty(len(rows), np.float64)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        # Repeating the last run gives every call one shape, hence one program.
        index = np.minimum(np.arange(start, start + size), len(rows) - 1)
        found = _outer_of_runs(
            params,
            opt_state,
            pool,
            jnp.asarray(rows[index], jnp.int32),
            loss=loss,
            outer=outer,
            optimizer=optimizer,
            microbatch=microbatch,
            parallel=min(parallel, size),
        )
        phi[start:stop] = np.asarray(found, np.float64)[: stop - start]
        progress(stop, len(rows))
    bad = np.flatnonzero(~np.isfinite(phi))
    if len(bad):
        raise NonFiniteMetagradient(
            f"{len(bad)} of {len(phi)} retrainings ended with an outer metric that is not finite, "
            f"the first is run {bad[0]} with {phi[bad[0]]}; lower the learning rate."
        )
    return phi


@functools.partial(
    jax.jit, static_argnames=("loss", "outer", "optimizer", "microbatch", "parallel")
)
def _outer_of_runs(params, opt_state, pool, rows, *, loss, outer, optimizer, microbatch, parallel):
    weights = jnp.ones(rows.shape[1:], jnp.result_type(*jax.tree.leaves(params)))

    def train(index):
        batches = jax.tree.map(lambda x: x[index], pool)
        end, *_ = run(loss, optimizer, params, opt_state, batches, weights, microbatch=microbatch)
        return outer(end)

    return jax.lax.map(train, rows, batch_size=parallel if parallel > 1 else None)

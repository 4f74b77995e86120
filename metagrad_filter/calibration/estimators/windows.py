"""Evaluations of many windows, a chunk at a time: losses and the norms of their gradients.

Cost: a forward pass a window for losses; a window gradient for norms, with as many gradients in
memory at once as a chunk has windows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.errors import NonFiniteMetagradient
from metagrad_filter.metagradient.trajectory import window_losses
from metagrad_filter.types import Loss, PyTree

_LOSSES, _GRADIENTS = 256, 32  # windows of a chunk


def in_chunks(
    function: Callable[[np.ndarray], jax.Array],
    windows: np.ndarray,
    size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """`(..., N)`: `function` of `(size, ...)` windows at a time, which has `size` as its last axis.

    The last chunk is filled up with its last window, so that all have one shape.
    """
    size = min(size, len(windows))
    found = []
    for start in range(0, len(windows), size):
        stop = min(start + size, len(windows))
        index = np.minimum(np.arange(start, start + size), len(windows) - 1)
        found.append(np.asarray(function(windows[index]))[..., : stop - start])
        progress(stop)
    return np.concatenate(found, axis=-1)


def losses_of(loss: Loss, params: PyTree, windows: np.ndarray) -> np.ndarray:
    """`(N,)` loss of each window."""
    return in_chunks(functools.partial(_losses, params, loss=loss), windows, _LOSSES)


def gradient_norms(
    loss: Loss, params: PyTree, windows: np.ndarray, *, microbatch: int | None = None
) -> np.ndarray:
    """`(N,)` float32 L2 norm of each window's gradient at `params`.

    Args:
      loss: `loss(params, batch) -> (B,)`.
      params: where the norms are frozen.
      windows: `(N, ...)`.
      microbatch: gradients that are in memory at once; None for 32.

    Raises:
      NonFiniteMetagradient: a norm is not finite; names the windows.
    """
    norms = in_chunks(
        functools.partial(_norms, params, loss=loss), windows, microbatch or _GRADIENTS
    )
    return finite_scores(norms, "gradient norms")


def finite_scores(scores: np.ndarray, what: str) -> np.ndarray:
    """`(..., N)` scores as float32; raises `NonFiniteMetagradient` naming the windows if not."""
    bad = sorted({int(place[-1]) for place in np.argwhere(~np.isfinite(scores))})
    if bad:
        raise NonFiniteMetagradient(
            f"the {what} of {len(bad)} of {scores.shape[-1]} windows are not finite; look at these "
            "windows and at the parameters.",
            windows=tuple(bad),
        )
    return scores.astype(np.float32)


@functools.partial(jax.jit, static_argnames="loss")
def _losses(params, windows, *, loss):
    return window_losses(loss, params, windows, len(windows))


@functools.partial(jax.jit, static_argnames="loss")
def _norms(params, windows, *, loss):
    def norm(window):
        gradient = jax.grad(lambda p: window_losses(loss, p, window[None], 1)[0])(params)
        squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradient)]
        return jnp.sqrt(sum(squares))

    return jax.vmap(norm)(windows)

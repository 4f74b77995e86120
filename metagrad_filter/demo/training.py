"""Training and evaluation of the demo's model: many steps inside one scan.

Learning rates are data, not part of the program: every training run of the demo, whatever its
schedule, shares one compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy.proxy import OptimizerFactory, Proxy
from metagrad_filter.types import Loss, PyTree

State = tuple[PyTree, PyTree]

_CHUNK = 12  # steps per compiled call: 2-3 times faster on CPU than one call a step
_RATES = 2048  # one length for all schedules, so that the program has one shape


def falling_rates(start: float, steps: int) -> np.ndarray:
    """`(steps,)` learning rates that fall linearly from `start` to a tenth of it."""
    return np.linspace(start, start / 10, steps + 1, dtype=np.float32)[:-1]


def fresh_state(factory: OptimizerFactory, params: PyTree) -> State:
    """Parameters with the optimizer state of a run that has not begun."""
    return params, factory(_unscheduled).init(params)


def continued_state(proxy: Proxy) -> State:
    """The proxy's parameters and warm moments, with the schedule at its beginning."""
    optimizer = proxy.optimizer(_unscheduled)
    return proxy.params, warm_state(optimizer, proxy.params, proxy.opt_state)


def train(
    loss: Loss,
    factory: OptimizerFactory,
    rates: np.ndarray,
    state: State,
    batches: np.ndarray,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> State:
    """Runs one optimizer step per batch; returns the new state.

    Args:
      loss: of the model.
      factory: schedule -> optax transformation.
      rates: `(total,)` learning rate of each step of the whole run, total <= 2048.
      state: parameters and optimizer state, as far as the run has come.
      batches: `(steps, B, T)` windows of the next steps.
      progress: called with the number of steps done.
    """
    padded = jnp.asarray(np.pad(rates, (0, _RATES - len(rates)), mode="edge"))
    for start in range(0, len(batches), _CHUNK):
        chunk = batches[start : start + _CHUNK]
        state = _steps(*state, chunk, padded, loss=loss, factory=factory)
        jax.block_until_ready(state)
        progress(start + len(chunk))
    return state


@functools.partial(jax.jit, static_argnames=("loss", "factory"))
def _steps(params, opt_state, batches, rates, *, loss, factory):
    weights = jnp.ones(batches.shape[:2], jnp.float32)
    optimizer: optax.GradientTransformation = factory(lambda count: rates[count])
    return run(loss, optimizer, params, opt_state, batches, weights)[:2]


def _unscheduled(count: jax.Array) -> jax.Array:
    return jnp.zeros_like(count, jnp.float32)


def mean_window_loss(loss: Loss, params: PyTree, windows: np.ndarray) -> float:
    """Mean loss of `(N, T)` windows, nats per token."""
    return float(window_losses(loss, params, windows).mean(dtype=np.float64))


def window_losses(loss: Loss, params: PyTree, windows: np.ndarray, size: int = 256) -> np.ndarray:
    """`(N,)` float32 loss of each window, nats per token."""
    count = -(-len(windows) // size)
    index = np.minimum(np.arange(count * size), len(windows) - 1)
    pieces = windows[index].reshape(count, size, -1)
    return np.asarray(_losses(params, pieces, loss=loss)).ravel()[: len(windows)]


@functools.partial(jax.jit, static_argnames="loss")
def _losses(params, pieces, *, loss):
    return jax.lax.map(lambda batch: loss(params, batch), pieces)

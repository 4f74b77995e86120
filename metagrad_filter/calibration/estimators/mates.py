"""MATES: train one step on one window, and look at the outer metric.

What is computed: `score = Phi(theta) - Phi(theta')`, where theta' is one step of the live optimizer
at the live learning rate, with its live moments, on this window alone. The halves are the mean fall
of the loss on one half of Phi's windows each.

Where it deviates from the paper: every label is probed, there are no influence labels that a
language model predicts (the scorer is ours), and the reference is the target part, not LAMBADA.

Cost: a gradient, an update and a forward pass over all of Phi's windows *a label*; hence
`config.probed_labels`.

References:
  Yu et al., 2024, https://arxiv.org/abs/2406.06046, equations 5 and 6 (locally probed influence).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.calibration.estimators.one_step import halves_differ
from metagrad_filter.calibration.estimators.task import FORWARD_COST, Estimate, Task, naming
from metagrad_filter.calibration.estimators.windows import finite_scores, in_chunks
from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.optimizer import apply_update, warm_state
from metagrad_filter.metagradient.trajectory import window_losses
from metagrad_filter.targets import HeldOutLoss, HeldOutMetric

_PROBED = 16  # windows of a compiled call


def mates(task: Task) -> Estimate:
    """Scores windows by what one optimizer step on each does to the outer metric."""
    proxy = task.proxy
    optimizer = proxy.transformation(proxy.learning_rate)
    state = warm_state(optimizer, proxy.params, proxy.opt_state)
    found = []
    with task.clock("labels"), naming(task.positions, "scoring"):
        for part in task.target.parts.values():
            pieces, shares = _in_pieces(part)
            effects = in_chunks(
                functools.partial(
                    _effects, proxy.params, state, pieces, shares, loss=proxy.loss, rule=optimizer
                ),
                task.windows,
                _PROBED,
                lambda done: task.progress("labels", done, len(task.windows)),
            )
            found.append(finite_scores(effects, "effects of a step"))
    each = 1 + FORWARD_COST * task.target_count
    return Estimate(
        np.stack(found),
        independent=halves_differ(task),
        gradients=len(task.windows) * each + FORWARD_COST * task.target_count,
    )


def _in_pieces(part: HeldOutMetric) -> tuple[np.ndarray, np.ndarray]:
    """Target windows `(pieces, size, ...)`, and weights `(2, pieces, size)` in the two halves.

    What fills up the last piece weighs nothing.
    """
    if not isinstance(part, HeldOutLoss):
        raise ConfigError(
            f"estimator='mates' looks at each held-out window's loss, but the target has a "
            f"{type(part).__name__}; take another estimator, or a HeldOutLoss."
        )
    windows = part.target_windows
    count = len(windows)
    size = min(part.batch_size, count)
    index = np.arange(-(-count // size) * size)
    cut = count // 2
    first, second = index < cut, (index >= cut) & (index < count)
    shares = np.stack([first / cut if cut else second, second / (count - cut)])
    pieces = windows[np.minimum(index, count - 1)].reshape(-1, size, *windows.shape[1:])
    return pieces, shares.reshape(2, -1, size).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("loss", "rule"))
def _effects(params, opt_state, pieces, shares, windows, *, loss, rule):
    def held_out(p):
        return jax.lax.map(lambda piece: window_losses(loss, p, piece, len(piece)), pieces)

    before = held_out(params)

    def effect(window):
        gradient = jax.grad(lambda p: window_losses(loss, p, window[None], 1)[0])(params)
        after = held_out(apply_update(rule, params, opt_state, gradient)[0])
        # Window by window first: the difference of two means would lose it to rounding.
        return jnp.sum(shares * (before - after), axis=(1, 2))

    return jax.lax.map(effect, windows).T

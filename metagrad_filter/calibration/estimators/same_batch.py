"""A cold start on one batch, repeated: metagradients of a batch's own weights, sixteen times over.

What is computed: the windows are cut into batches at random; for each, sixteen optimizer steps are
run on that same batch from zero moments (AdamW with epsilon inside the root, 1e-8), -dPhi/dw of
each window is summed over the steps and brought to mean 0 and deviation 1 within the batch. Two
passes over the windows, in two orders, are the halves.

What it measures is what memorising a batch does to the outer metric: the scores of a cold Adam
trajectory sum to zero whatever the data are worth, so a label only compares a window with the
others of its batch.

Where it deviates from MetaGrad-Distill, which it stands for: two passes (there 4.2), the target's
own windows, and the round's inner learning rate (the first share of the ladder where none is set).

Cost: sixteen steps of 3.66 gradients *a label and pass*; hence `config.probed_labels`.

References:
  MetaGrad-Distill, https://github.com/nick-rui/metagrad-distill.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.calibration.estimators.task import SWEEP_COST, Estimate, Task, naming
from metagrad_filter.metagradient.adjoint import metagradients
from metagrad_filter.types import Loss, Outer, PyTree

STEPS, PASSES = 16, 2


def same_batch(task: Task) -> Estimate:
    """Scores windows by their weights in a repeated batch of their own."""
    proxy, config = task.proxy, task.config
    scale = config.learning_rate_scales[0]
    optimizer = cold_optimizer(proxy.learning_rate * scale)
    outers = [part.outer(proxy.loss) for part in task.target.parts.values()]
    count = len(task.windows)
    size = min(config.batch_windows, count)
    batches = -(-count // size)
    halves = np.empty((len(outers), PASSES, count), np.float32)
    with task.clock("labels"):
        for i in range(PASSES):
            rng = np.random.default_rng([*np.atleast_1d(task.seed), 2, i])
            order = rng.permutation(count)
            for b in range(batches):
                task.progress("labels", i * batches + b, PASSES * batches)
                # The last batch is filled up with windows that have their label already.
                rows = order[min(b * size, count - size) :][:size]
                with naming(np.broadcast_to(task.positions[rows], (STEPS, size)), "scoring"):
                    for k, outer in enumerate(outers):
                        halves[k, i, rows] = repeated_batch_scores(
                            proxy.loss,
                            outer,
                            proxy.params,
                            optimizer,
                            task.windows[rows],
                            microbatch=config.microbatch,
                        )
        task.progress("labels", PASSES * batches, PASSES * batches)
    each = STEPS * size * SWEEP_COST * len(outers) + task.target_count
    return Estimate(
        halves,
        independent=True,
        gradients=PASSES * batches * each,
        learning_rate_scale=scale,
        horizon=STEPS,
    )


@functools.lru_cache(maxsize=16)
def cold_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """The optimizer of the repeated batch; the same object for the same rate."""
    return optax.adamw(learning_rate, b2=0.95, eps=0.0, eps_root=1e-8, weight_decay=0.01)


def repeated_batch_scores(
    loss: Loss,
    outer: Outer,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    batch: np.ndarray,
    opt_state: PyTree = None,
    *,
    microbatch: int | None = None,
) -> np.ndarray:
    """`(B,)` float64 scores of a batch that every step repeats, of mean 0 and deviation 1.

    Args:
      loss, outer, params, optimizer: as for `metagradients`, with one outer metric.
      batch: `(B, ...)` windows.
      opt_state: moments to start from; None for zeros.
      microbatch: windows per gradient evaluation.
    """
    state = optimizer.init(params) if opt_state is None else opt_state
    repeated = jnp.broadcast_to(batch, (STEPS, *np.shape(batch)))
    found = metagradients(
        loss, outer, params, state, repeated, optimizer=optimizer, microbatch=microbatch
    )
    total = np.asarray(found.scores, np.float64).sum(axis=0)
    deviation = total.std()
    return (total - total.mean()) / (deviation if deviation > 0 else 1.0)

"""One evaluation of the model's second derivative: Hessian product and per-window slopes at once.

    (l_dot, Hc) <- JVP of theta -> (losses, gradient of the weighted loss) along c

Cost: about 2.7 gradient evaluations in arithmetic. Memory: that of one microbatch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from metagrad_filter.metagradient.optimizer import widened
from metagrad_filter.metagradient.trajectory import from_pieces, in_pieces
from metagrad_filter.types import Loss, PyTree


def second_order(
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    weights: jax.Array,
    direction: PyTree,
    total: PyTree,
    *,
    microbatch: int | None,
    differentiation: str,
    stacked: bool,
) -> tuple[PyTree, jax.Array]:
    """Adds the Hessian of the weighted loss times a direction to `total`; slopes of the losses.

    Args:
      loss: `loss(params, batch) -> (B,)`.
      params: where the derivatives are taken.
      batch: pytree of arrays with a leading axis `B`.
      weights: `(B,)`; the objective is `sum_i w_i loss_i / B`.
      direction: like params, in float32 or wider; with a leading axis of targets if `stacked`.
      total: like direction; pieces are added to it, so that one copy of the parameters is enough.
      microbatch: windows per evaluation, None for all.
      differentiation: "forward_over_reverse" or "reverse_over_reverse".
      stacked: whether there are several targets; they share the primal evaluation.

    Returns:
      The sum, and slopes `<grad loss_i, direction>`, `(B,)` or `(K, B)`.
    """
    size = weights.shape[0]

    def objective(p, x, w):
        losses = loss(p, x)
        return jnp.sum(w * losses) / size, losses

    def forward_over_reverse(x, w, c):
        def gradient(p):
            (_, losses), g = jax.value_and_grad(objective, has_aux=True)(p, x, w)
            return losses, g

        _, (slopes, product) = jax.jvp(gradient, (params,), (c,))
        return product, slopes

    def reverse_over_reverse(x, w, c):
        def inner(p, w):
            g = jax.grad(lambda p: objective(p, x, w)[0])(p)
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, g, c)))

        product, slopes = jax.grad(inner, argnums=(0, 1))(params, w)
        return product, slopes * size

    modes = {
        "forward_over_reverse": forward_over_reverse,
        "reverse_over_reverse": reverse_over_reverse,
    }
    along = modes[differentiation]
    direction = jax.tree.map(lambda c, p: c.astype(p.dtype), direction, params)

    def add(total: PyTree, inputs) -> tuple[PyTree, jax.Array]:
        x, w = inputs
        evaluate = functools.partial(along, x, w)
        product, slopes = (jax.vmap(evaluate) if stacked else evaluate)(direction)
        return jax.tree.map(jnp.add, total, widened(product)), slopes

    if microbatch is None or microbatch >= size:
        return add(total, (batch, weights))
    total, slopes = jax.lax.scan(add, total, in_pieces(batch, weights, microbatch))
    return total, from_pieces(slopes, size)

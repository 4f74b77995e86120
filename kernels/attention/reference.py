"""`implementation="reference"`: the formulas on the whole score matrix, in plain `jax.numpy`.

Answers "what must every implementation compute?". One tile holds everything, so memory is
O(B H S S_k); jax can differentiate it to any order. Inputs and outputs as in `primitives.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metagrad_filter.kernels.attention import formulas, parts  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.formulas import HEADS, OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.pattern import (  # pyright: ignore[reportMissingImports]
    Pattern,
    both,
    same_segment,
)


def run(
    name: str, pattern: Pattern, *operands: Any, wanted: Sequence[bool] | None = None
) -> list[jax.Array]:
    """Computes primitive `name` in float32, or float64 where the operands are.

    Args:
      name: of `formulas.OPERANDS`.
      pattern: which scores there are.
      *operands: its operands, None for those that are zero; segment ids may follow.
      wanted: which outputs to return, all by default.
    """
    kinds, outputs = OPERANDS[name]
    q, k = operands[:2]
    groups = q.shape[2] // k.shape[2]
    width = jnp.promote_types(q.dtype, jnp.float32)
    laid = [
        None if x is None else _lay(kind, x.astype(width), groups)
        for kind, x in zip(kinds, operands)
    ]
    rows, columns = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None]
    visible = pattern.visible(rows, columns, k.shape[1])
    for segments in operands[len(kinds) :]:
        ids = jnp.repeat(segments, k.shape[2], axis=0)
        visible = both(visible, same_segment(ids, ids))
    found = whole(name, pattern.scale, visible, *laid)
    wanted = parts.everything(name) if wanted is None else wanted
    return [
        parts.zeros(kind, q, k) if x is None else _unlay(kind, x, q.shape, q.dtype)
        for kind, x in parts.chosen(wanted, list(zip(outputs, found, strict=True)))
    ]


def whole(name: str, scale: float, visible, *operands: Any) -> tuple[jax.Array | None, ...]:
    """Primitive `name` where one tile holds every score; operands laid out as in `formulas`."""
    if name == "fwd":
        q, k, v = operands
        x = scale * HEADS.scores(q, k)
        norm = jax.nn.logsumexp(x if visible is None else jnp.where(visible, x, -jnp.inf), axis=-1)
        # Rows that see nothing get weights of 0 from here on.
        norm = jnp.where(norm == -jnp.inf, jnp.inf, norm)
        return HEADS.rows(formulas.probabilities(HEADS, q, k, norm, scale, visible), v), norm
    p = formulas.probabilities(HEADS, operands[0], operands[1], operands[3], scale, visible)
    return formulas.FORMULAS[name](HEADS, p, scale, *operands)


def _lay(kind: str, x: jax.Array, groups: int) -> jax.Array:
    """From the layout of `attention` to that of `formulas`."""
    if kind == "r":
        return x.reshape(-1, groups, x.shape[2])
    length, width = x.shape[1], x.shape[3]
    if kind == "k":
        return x.swapaxes(1, 2).reshape(-1, length, width)
    return x.swapaxes(1, 2).reshape(-1, groups, length, width)


def _unlay(kind: str, x: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    batch, length, heads, width = shape
    if kind == "r":
        return x.reshape(batch, heads, length)
    if kind == "k":
        return x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2).astype(dtype)
    return x.reshape(batch, heads, length, width).swapaxes(1, 2).astype(dtype)

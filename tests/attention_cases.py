"""What the tests of attention share: the function by its definition, and every derivative of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.kernels.attention import attention  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.chunked import Tiling  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.chunked import run as run_chunked  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.implementations import IMPLEMENTATIONS, Implementation  # pyright: ignore[reportMissingImports]

# Tiles so small that short sequences take several, with padding in the last one.
TINY = Tiling(rows=8, columns=8, scores=128)
tiny = functools.partial(run_chunked, tiling=TINY)
IMPLEMENTATIONS.setdefault("tiny", Implementation(tiny, tiny, partial=True))

# Programs that run once: most of a test is their compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def naive(q, k, v, *, causal=True, window=None, segment_ids=None, scale=None):
    """The whole softmax, differentiated by jax alone."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    i, j = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None]
    visible = j <= i if causal else jnp.ones((q.shape[1], k.shape[1]), bool)
    if window is not None:
        visible &= abs(i - j) <= window
    visible = visible[None, None]
    if segment_ids is not None:
        visible &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    logits = jnp.where(visible, jnp.einsum("bihd,bjhd->bhij", q, k) * scale, -1e30)
    shares = jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0)
    return jnp.einsum("bhij,bjhd->bihd", shares, v)


def example(
    shape=(2, 20, 4, 4), keys=None, key_heads=None, dtype: Any = np.float64, seed=0, count=3
):
    """`count` arrays: the first like q, the others like k; a second call's tangents likewise."""
    rng = np.random.default_rng(seed)
    batch, length, heads, width = shape
    other = (batch, keys or length, key_heads or heads, width)
    return tuple(
        jnp.asarray(rng.normal(size=shape if i % 3 == 0 else other), dtype) for i in range(count)
    )


def documents(batch, length, seed=0):
    """Sorted ids: packed documents of uneven lengths."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.sort(rng.integers(0, 4, (batch, length)), axis=1), jnp.int32)


def transformations(attend):
    """Every composition of derivatives, as functions of (q, k, v) and a tangent of each."""

    def total(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v)) * jnp.cos(q))

    gradient = jax.grad(total, (0, 1, 2))

    def slope(x, along):
        return sum(jnp.sum(a * b) for a, b in zip(gradient(*x), along))

    def push(f):
        return lambda x, along: jax.jvp(f, x, along)[1]

    def several(x, along):
        stacked = [jnp.stack([y, y**2]) for y in along]
        return jax.vmap(lambda *t: jax.jvp(gradient, x, t)[1])(*stacked)

    def mapped(x, along):
        x = [jnp.stack([y, jnp.sin(y)], axis=1) for y in x]
        in_axes = ((1, None, 1), None)
        return jax.vmap(lambda y, t: jax.grad(slope)(y, t), in_axes)(
            (x[0], x[1][:, 0], x[2]), along
        )

    def trained(x, along):
        def step(moved, _):
            found = jax.vmap(jax.grad(lambda q, k, v: total(q[None], k[None], v[None]), (0, 1, 2)))
            return tuple(y - 0.1 * g for y, g in zip(moved, found(*moved))), None

        def after(weight):
            start = tuple(weight * y for y in x)
            return total(*jax.lax.scan(jax.checkpoint(step), start, length=2)[0])

        return jax.grad(after)(jnp.ones((), x[0].dtype)) + 0 * along[0][0, 0, 0, 0]

    def linearized(x, along):
        return jax.linearize(gradient, *x)[1](*along)

    kept = jax.checkpoint(total)
    return {
        "value": lambda x, along: attend(*x),
        "grad": lambda x, along: gradient(*x),
        "jvp": push(total),
        "reverse over reverse": jax.grad(slope),
        "forward over reverse": push(gradient),
        "reverse over forward": jax.grad(lambda x, along: push(total)(x, along)),
        "forward over forward": lambda x, along: push(lambda *y: push(total)(y, along))(x, along),
        "linearize": linearized,
        "vmap of tangents": several,
        "vmap of operands": mapped,
        "checkpoint": lambda x, along: jax.jvp(jax.grad(kept, (0, 1, 2)), x, along)[1],
        "gradient through training": trained,
    }


def worst(found, expected):
    """The largest difference, relative to the largest entry of each array."""
    return max(
        float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-300))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def attend(implementation, **options):
    return functools.partial(attention, implementation=implementation, **options)

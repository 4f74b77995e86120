"""The function that callers use: checks, dtypes, and where the mean of keys and values goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention.implementations import choose  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.pattern import Pattern  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.primitives import bind  # pyright: ignore[reportMissingImports]

DTYPES = ("bfloat16", "float16", "float32", "float64")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Any = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with first and second derivatives in memory linear in the sequence.

    Every composition of `grad`, `vjp`, `jvp`, `vmap`, `jit`, `checkpoint` and `shard_map` works;
    derivatives beyond the second do too, in memory O(S S_k). Positions of queries and keys start
    at 0 both. A query that sees no key (its position is `window` or more past the last) gives 0.
    Statistics of the softmax are float32, or float64 where the operands are. For operands of
    16 bits the mean over all keys is taken out of `k` and `v` first, which changes neither the
    function nor its derivatives, and keeps the rounding of both small where the mean is large.

    Args:
      q: `(B, S, H, d)`, floating point.
      k: `(B, S_k, H_kv, d)`; each of its heads serves `H / H_kv` consecutive heads of `q`.
      v: `(B, S_k, H_kv, d)`.
      causal: whether position i sees positions up to i only.
      window: a position i sees positions from `i - window` to `i + window` only (to i where
        causal), as `local_window_size` of `jax.nn.dot_product_attention`; None for all. A model
        whose configuration says `sliding_window=n` has `window=n - 1`.
      segment_ids: `(B, S)` integers; a position sees those with its own id only. Needs S = S_k.
      scale: factor of `q k^T`, `d ** -0.5` by default.
      implementation: "chunked" (linear memory, any device), "reference" (O(S S_k) memory, the
        specification), "pallas" (GPUs that Triton compiles for), "thunderkittens" (Hopper),
        "thunderkittens_fused" (Hopper, d up to 64; fewer products, added up in no fixed order), or
        None for the best that is known to run here: "chunked", as no GPU has run the last three.

    Returns:
      `(B, S, H, d)` in the dtype of the operands.

    Raises:
      ConfigError: shapes or dtypes do not fit, an argument is out of its domain, or the named
        implementation cannot run here.

    References:
      Dao, 2024, https://arxiv.org/abs/2307.08691 (first derivatives in tiles).

    >>> x = jax.numpy.ones((1, 3, 2, 4))
    >>> attention(x, x, x).shape
    (1, 3, 2, 4)
    """
    q, k, v = _arrays(q, k, v)
    segments = () if segment_ids is None else (_segments(segment_ids, q, k),)
    pattern = _pattern(q.shape[-1], causal, window, scale)
    static = {"pattern": pattern, "implementation": choose(implementation, q)}
    run: Callable[..., Any] = functools.partial(_plain if q.dtype.itemsize > 2 else _narrow, static)
    if jax.typeof(q).sharding.mesh.explicit_axes:
        return _placed(run, q, k, v, *segments)
    return run(q, k, v, *segments)


def _placed(run: Callable[..., Any], q: jax.Array, k: jax.Array, *rest: jax.Array) -> jax.Array:
    """Where types carry shardings: each device computes its part of the batch and of the heads."""
    sharding = jax.typeof(q).sharding
    mesh = sharding.mesh
    batch, _, heads, _ = (*sharding.spec, None, None, None, None)[:4]
    axes = (heads,) if isinstance(heads, str) else (heads or ())
    if k.shape[2] % math.prod(mesh.shape[axis] for axis in axes):
        heads = None  # a key head would lie on several devices
    whole, ids = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    operands = (q, k, *rest)
    specs = tuple(whole if x.ndim == 4 else ids for x in operands)
    mapped = jax.shard_map(
        run,
        in_specs=specs,
        out_specs=whole,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
    )
    return mapped(*(jax.reshard(x, spec) for x, spec in zip(operands, specs)))


def _plain(static: dict[str, Any], *operands: jax.Array) -> jax.Array:
    return bind("fwd", *operands, **static)[0]


def _narrow(static: dict[str, Any], q, k, v, *segments: jax.Array) -> jax.Array:
    """Attention to what keys and values are beside their means."""
    (k, _), (v, mean) = _centred(k), _centred(v)
    o = bind("fwd", q, k, v, *segments, **static)[0]
    mean = jnp.repeat(mean, q.shape[2] // k.shape[2], axis=2)
    blind = static["pattern"].blind_from(k.shape[1])
    if blind is not None and blind < q.shape[1]:
        mean = jnp.where(jnp.arange(q.shape[1])[:, None, None] < blind, mean, 0.0)
    return (o.astype(mean.dtype) + mean).astype(q.dtype)


def _centred(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` without its mean over positions, and the mean, `(B, 1, H_kv, d)` float32."""
    mean = jax.lax.stop_gradient(x.astype(jnp.float32).mean(axis=1, keepdims=True))
    return (x.astype(jnp.float32) - mean).astype(x.dtype), mean


def _arrays(*operands: Any) -> tuple[jax.Array, ...]:
    q, k, v = found = tuple(jnp.asarray(x) for x in operands)
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    expected = "expected (B, S, H, d), (B, S_k, H_kv, d) and again (B, S_k, H_kv, d)"
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape
    if not fits or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ConfigError(f"{shapes} do not fit; {expected}.")
    if 0 in q.shape or 0 in k.shape:
        raise ConfigError(f"{shapes} hold nothing; {expected}, every size at least 1.")
    if q.shape[2] % k.shape[2]:
        raise ConfigError(
            f"q has {q.shape[2]} heads and k has {k.shape[2]}; expected a multiple, so that each "
            "key head serves as many query heads."
        )
    dtypes = [str(x.dtype) for x in found]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        raise ConfigError(
            f"q, k and v have dtypes {', '.join(dtypes)}; expected one of {', '.join(DTYPES)} for "
            "all three: cast them first."
        )
    return found


def _segments(segment_ids: Any, q: jax.Array, k: jax.Array) -> jax.Array:
    ids = jnp.asarray(segment_ids)
    if q.shape[1] != k.shape[1]:
        raise ConfigError(
            f"segment_ids are given for {q.shape[1]} queries and {k.shape[1]} keys; expected as "
            "many keys as queries, since one id counts for both."
        )
    if ids.shape != q.shape[:2] or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(
            f"segment_ids are {ids.dtype} of shape {ids.shape}; expected integers of shape "
            f"{q.shape[:2]}."
        )
    return ids.astype(jnp.int32)


def _pattern(width: int, causal: Any, window: Any, scale: Any) -> Pattern:
    if not isinstance(causal, bool | np.bool_):
        raise ConfigError(f"causal={causal!r}; expected True or False.")
    whole = isinstance(window, int | np.integer) and not isinstance(window, bool)
    if window is not None and not (whole and window >= 0):
        raise ConfigError(
            f"window={window!r}; expected an int of at least 0, or None for no limit."
        )
    if scale is None:
        scale = width**-0.5
    number = isinstance(scale, int | float | np.number) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale):
        raise ConfigError(
            f"scale={scale!r}; expected a finite number, or None: multiply q by what is an array."
        )
    side = None if window is None else int(window)
    return Pattern(float(scale), side, 0 if causal else side)

"""What the decoder families share: checks of their fields, precision, and the walk over blocks.

Answers "in which dtype does a decoder compute, and what does it keep for the backward pass?". Pure
functions; nothing here holds parameters. Read next: `decoder` (GPT-2) or `llama`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import attention  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.implementations import IMPLEMENTATIONS  # pyright: ignore[reportMissingImports]

COMPUTE_DTYPES = ("float32", "bfloat16")
XLA = "xla"


def check_sizes(config: Any, *names: str) -> None:
    """Raises `ConfigError` unless each named field is a positive integer."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}; expected a positive integer.")


def check_positive(config: Any, *names: str) -> None:
    """Raises `ConfigError` unless each named field is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ConfigError(f"{name}={value!r}; expected a positive number.")


def check_choice(config: Any, name: str, choices: Iterable[str]) -> None:
    """Raises `ConfigError` unless the named field is one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name}={value!r}; expected one of {sorted(choices)}.")


def check_flags(config: Any, *names: str) -> None:
    """Raises `ConfigError` unless each named field is a bool."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r}; expected True or False.")


def check_attention(config: Any) -> None:
    """Raises `ConfigError` unless `attn_implementation` is None or names what attention runs on."""
    if config.attn_implementation is not None:
        check_choice(config, "attn_implementation", (XLA, *IMPLEMENTATIONS))


def layer_dtype(dtype: str) -> Any:
    """The `dtype` of flax layers: None lets operands promote, so float64 parameters stay exact."""
    return jnp.bfloat16 if dtype == "bfloat16" else None


def enter(x: jax.Array, dtype: str) -> jax.Array:
    """Embedded tokens in the compute dtype: bfloat16, or float32 and wider."""
    if dtype == "bfloat16":
        return x.astype(jnp.bfloat16)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str | None = None
) -> jax.Array:
    """Softmax attention of each position to itself and what came before, scaled by `d ** -0.5`.

    Args:
      query: `(B, S, H, d)`, in the dtype of all three.
      key: `(B, S, K, d)`; each of the K heads serves `H / K` consecutive query heads.
      value: `(B, S, K, d)`.
      implementation: of `kernels.attention`, None for the best that is known to run here; or "xla",
        the whole softmax as jax differentiates it, which takes memory O(S^2).

    Returns:
      `(B, S, H, d)` in that dtype; the softmax is taken in float32 or wider, and but for "xla"
      second derivatives take memory linear in S.

    Raises:
      ConfigError: the implementation cannot run here.
    """
    if implementation == XLA:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")
    return attention(query, key, value, implementation=implementation)


def walk(blocks: Sequence[nnx.Module], x: jax.Array, *rest: jax.Array, remat: bool) -> jax.Array:
    """Passes `x` through the blocks; with `remat` the backward pass keeps block inputs only.

    Memory of activations falls from all blocks' to one block's and one `(B, S, D)` array per
    block, beside a copy of the blocks' parameters; each block's forward pass is computed a second
    time. Programs compile once for all blocks then, instead of once for each.

    Args:
      blocks: of one shape; with `remat`, of one configuration as well.
      x: `(B, S, D)`.
      *rest: further arguments of every block.

    Raises:
      ConfigError: `remat` with blocks that are not alike.
    """
    if not remat:
        for block in blocks:
            x = block(x, *rest)  # pyright: ignore[reportCallIssue]
        return x
    # A loop, because XLA's CPU compiler finds what is computed twice outside of one and keeps it.
    graphs, states = zip(*(nnx.split(block) for block in blocks))
    kinds = [jax.tree.map(lambda p: (p.shape, p.dtype), state) for state in states]
    if any((g, k) != (graphs[0], kinds[0]) for g, k in zip(graphs, kinds)):
        raise ConfigError(
            "remat=True with blocks that differ in configuration, shapes or dtypes; expected one "
            "kind of block, which the loop over them computes: make them alike, or remat=False."
        )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
        return nnx.merge(graphs[0], state)(x, *rest), None

    return jax.lax.scan(step, x, jax.tree.map(lambda *y: jnp.stack(y), *states))[0]

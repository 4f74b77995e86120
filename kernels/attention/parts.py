"""Which operands of a primitive are there, and which of its outputs are asked for.

Tangents and cotangents that are zero are no operands at all, and cotangents that nobody asks for
are no outputs: what depends on them is not computed. Two tuples of bools say so, `given` for the
operands of `formulas.OPERANDS` and `wanted` for the outputs; both are static. Segment ids, where
there are any, follow the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metagrad_filter.kernels.attention import _jax  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]


def everything(name: str) -> tuple[bool, ...]:
    """`wanted` for every output of a primitive."""
    return (True,) * len(OPERANDS[name][1])


def spread(flags: Sequence[bool], present: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Puts None where a flag is False; also returns what follows: the segment ids."""
    rest = iter(present)
    return [next(rest) if flag else None for flag in flags], list(rest)


def chosen(flags: Sequence[bool], items: Sequence[Any]) -> list[Any]:
    """The items whose flag is True."""
    return [x for flag, x in zip(flags, items, strict=True) if flag]


def kinds_of(name: str, given: Sequence[bool], count: int) -> str:
    """Kinds of `count` operands of which the last may be segment ids, "i"."""
    kinds = "".join(chosen(given, OPERANDS[name][0]))
    return kinds + "i" * (count - len(kinds))


def of_whole(run: Callable[..., Sequence[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """Makes an implementation of every operand and output one that takes some of them.

    Args:
      run: `run(name, pattern, *operands)`, with all operands and segment ids, to all outputs.
    """

    def some(name: str, pattern: Any, *operands: Any, wanted: Sequence[bool]) -> list[jax.Array]:
        kinds = OPERANDS[name][0]
        q, k = operands[:2]
        filled = [zeros(kind, q, k) if x is None else x for kind, x in zip(kinds, operands)]
        return chosen(wanted, run(name, pattern, *filled, *operands[len(kinds) :]))

    return some


def zeros(kind: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """Zeros of this kind, varying over devices as `q` does."""
    if kind == "r":
        shape = (q.shape[0], q.shape[2], q.shape[1])
        empty = jnp.zeros(shape, jnp.promote_types(q.dtype, jnp.float32))
    else:
        empty = jnp.zeros((q if kind == "q" else k).shape, q.dtype)
    return _jax.align([empty, q])[0]

"""Activation functions whose derivatives of every order cost one transcendental between them.

Each function is algebraic in its input `x` and statistics `t(x)`: a sigmoid and its slope for
"silu" and "gelu_new", distribution function and density of the normal for "gelu". So is the
derivative of `t`, hence every derivative of the function: a tower of formulas in `(x, t)`, in which
`t` is computed once and never differentiated. Differentiation as usual instead leaves XLA free to
evaluate the transcendental again in each of the many loops that the gradient, its tangent and their
transposed copies become; on CPU the statistics are therefore held behind an optimization barrier.

jax drops the rule of a `custom_jvp` where it splits a loop into what is known and what is linear
(`JaxprTrace.process_custom_jvp_call`), and differentiates the formula itself from there on. So the
statistics depend on `x` for jax too: with the rules that dependence is never used, without them it
makes the derivative right.

Cost: one transcendental an element ("gelu" two) for the value and all derivatives together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Formula = Callable[[jax.Array, tuple[jax.Array, ...]], jax.Array]

_CUBIC_SCALE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def _activation(
    name: str,
    statistics: Callable[[jax.Array], tuple[jax.Array, ...]],
    value: Formula,
    slopes: Callable[[jax.Array, tuple[jax.Array, ...]], tuple[jax.Array, ...]],
) -> Callable[[jax.Array], jax.Array]:
    """The activation `value(x, t(x))` with its tower of derivatives.

    Args:
      name: of the returned function.
      statistics: `x -> t`, the only place of transcendentals.
      value: algebraic in `x` and `t`.
      slopes: `(x, t) -> dt/dx`, algebraic too.

    Returns:
      An elementwise function of a floating-point array, differentiable to any order in any mode.
    """

    @functools.cache
    def formula(order: int) -> Formula:
        if order == 0:
            return value
        below = formula(order - 1)
        return lambda x, t: jax.jvp(below, (x, t), (jnp.ones_like(x), slopes(x, t)))[1]

    @functools.cache
    def derivative(order: int) -> Formula:
        at = jax.custom_jvp(formula(order))

        @at.defjvp
        def _(primals, tangents):
            # The formula above is the total derivative: what t contributes is already in it.
            return at(*primals), derivative(order + 1)(*primals) * tangents[0]

        return at

    measured = jax.custom_jvp(lambda x: _held(statistics(x)))

    @measured.defjvp
    def _(primals, tangents):
        t = measured(*primals)
        return t, tuple(slope * tangents[0] for slope in slopes(primals[0], t))

    def activation(x: jax.Array) -> jax.Array:
        return derivative(0)(x, measured(x))

    activation.__name__ = activation.__qualname__ = name
    return activation


def _held(statistics: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Materialises the statistics on CPU; elsewhere a write to memory costs more than a tanh."""
    return jax.lax.platform_dependent(
        statistics, cpu=jax.lax.optimization_barrier, default=lambda t: t
    )


def _logistic(v: jax.Array) -> tuple[jax.Array, ...]:
    """The sigmoid and its derivative, from one exponential."""
    # From s alone the derivative s (1 - s) cancels in the upper tail, which x v'^2 then enlarges.
    decay = jnp.exp(jnp.where(v >= 0, -v, v))  # -|v|, with a slope at 0
    upper = 1 / (1 + decay)
    return jnp.where(v >= 0, upper, decay * upper), decay * upper * upper


def _logistic_slopes(t: tuple[jax.Array, ...], inner: jax.Array) -> tuple[jax.Array, ...]:
    """Of `_logistic(v(x))` where `inner = dv/dx`."""
    return t[1] * inner, t[1] * (1 - 2 * t[0]) * inner


def _doubled_cubic(x):
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    return _CUBIC_SCALE * (x + _CUBIC * x * x * x)


def _doubled_cubic_slope(x):
    return _CUBIC_SCALE * (1 + 3 * _CUBIC * x * x)


def _normal(x):
    """Distribution function and density of the standard normal."""
    # erfc keeps its relative accuracy in the lower tail, where 1 + erf cancels.
    return (
        0.5 * jax.lax.erfc(x * -math.sqrt(0.5)),
        jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)),
    )


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": _activation(
        "gelu_new",
        lambda x: _logistic(_doubled_cubic(x)),
        lambda x, t: x * t[0],
        lambda x, t: _logistic_slopes(t, _doubled_cubic_slope(x)),
    ),
    "gelu": _activation("gelu", _normal, lambda x, t: x * t[0], lambda x, t: (t[1], -x * t[1])),
    "silu": _activation(
        "silu",
        _logistic,
        lambda x, t: x * t[0],
        lambda x, t: _logistic_slopes(t, jnp.ones_like(x)),
    ),
    # Nothing transcendental to keep.
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
"""By name: "gelu_new" (tanh approximation), "gelu" (exact), "silu", "relu2" (squared ReLU).

References:
  Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415 (GELU and its approximation).
  So et al., 2021, https://arxiv.org/abs/2109.08668, section 4 (squared ReLU).
"""

"""The mathematics of second-order attention, for one tile of the score matrix.

Answers "what are attention, its derivatives and their derivatives, as local partial derivatives?".
With `s` the scale, `S = s q k^T` the scores that a query sees, `L = logsumexp_j S` and
`P = exp(S - L)`, the logsumexp `L` and `D = rowsum(do o)` are inputs like any other:

    fwd  (q, k, v)                        o = P v,  L
    lin  (q, k, v, L | a, b, c)           U = (P W) v + P c,  R = rowsum(P W)
    bwd  (q, k, v, L, do, D)              s dS k,  s dS^T q,  P^T do
    hess (q, k, v, L, do, D | t...)       the tangent of bwd along one tangent of each operand
    adj  (q, k, v, L, do, D | a, b, c)    the cotangents of those six tangents
    lin2 (q, k, v, L, a, b, c | t...)     the tangent of lin along tangents of q, k, v and L

    W = s (a k^T + q b^T),   X = do v^T - D,   dS = P X

Each rule is a partial derivative in all its operands, so jax's chain rule does the rest: the
derivative of fwd along (a, b, c) is `(U - R o, R)`; lin and bwd are transposes of each other (U
against do, R against -D), and so are hess and adj, which share their five products. What flows
through L and D ends in the ordinary bwd of the layer, which reverse over reverse runs anyway.

Every output is a sum over the columns or the rows of the tile: a sum over tiles is the whole.
Alphabet: `n` batch times key heads, `g` query heads that share a key head, `i` queries, `j` keys.
Row operands `(n, g, i, d)`, columns `(n, j, d)`, statistics `(n, g, i)`, scores `(n, g, i, j)`.

References:
  Dao, 2024, https://arxiv.org/abs/2307.08691, section 3.1 (fwd and bwd in tiles).
  Pearlmutter, 1994, https://doi.org/10.1162/neco.1994.6.1.147 (the tangent of a gradient).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Operands and outputs by kind: q a row operand, k a column operand, r a statistic of each row.
OPERANDS = {
    "fwd": ("qkk", "qr"),
    "lin": ("qkkrqkk", "qr"),
    "bwd": ("qkkrqr", "qkk"),
    "hess": ("qkkrqrqkkrqr", "qkk"),
    "adj": ("qkkrqrqkk", "qkkrqr"),
    "lin2": ("qkkrqkkqkkr", "qr"),
}


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`q k^T`: `(n, g, i, d)` and `(n, j, d)` to `(n, g, i, j)`."""
    return jax.lax.dot_general(q, k, (((3,), (2,)), ((0,), (0,))))


def rows(p: jax.Array, k: jax.Array) -> jax.Array:
    """`p k`: `(n, g, i, j)` and `(n, j, d)` to `(n, g, i, d)`."""
    return jax.lax.dot_general(p, k, (((3,), (1,)), ((0,), (0,))))


def columns(p: jax.Array, q: jax.Array) -> jax.Array:
    """`p^T q`, summed over the heads that share a key: to `(n, j, d)`."""
    return jax.lax.dot_general(p, q, (((1, 2), (1, 2)), ((0,), (0,))))


def probabilities(q, k, norm, scale: float, visible) -> jax.Array:
    """`P`; 0 where `visible` is False, and in rows whose logsumexp is +inf as they see nothing."""
    x = scale * scores(q, k) - norm[..., None]
    return jnp.exp(x if visible is None else jnp.where(visible, x, -jnp.inf))


def lin(p, scale, q, k, v, norm, a, b, c):
    z = p * (scale * (scores(a, k) + scores(q, b)))
    return rows(z, v) + rows(p, c), z.sum(-1)


def bwd(p, scale, q, k, v, norm, do, d):
    ds = scale * (p * (scores(do, v) - d[..., None]))
    return rows(ds, k), columns(ds, q), columns(p, do)


def hess(p, scale, q, k, v, norm, do, d, tq, tk, tv, tnorm, tdo, td):
    x = scores(do, v) - d[..., None]
    ds = scale * (p * x)
    tp = p * (scale * (scores(tq, k) + scores(q, tk)) - tnorm[..., None])
    tds = scale * (tp * x + p * (scores(tdo, v) + scores(do, tv) - td[..., None]))
    return (
        rows(tds, k) + rows(ds, tk),
        columns(tds, q) + columns(ds, tq),
        columns(tp, do) + columns(p, tdo),
    )


def adj(p, scale, q, k, v, norm, do, d, a, b, c):
    x = scores(do, v) - d[..., None]
    ds = scale * (p * x)
    z = p * (scale * (scores(a, k) + scores(q, b)))
    y = z * x + p * scores(do, c)
    return (
        scale * rows(y, k) + rows(ds, b),
        scale * columns(y, q) + columns(ds, a),
        columns(z, do),
        -y.sum(-1),
        rows(z, v) + rows(p, c),
        -z.sum(-1),
    )


def lin2(p, scale, q, k, v, norm, a, b, c, tq, tk, tv, tnorm):
    w = scale * (scores(a, k) + scores(q, b))
    tp = p * (scale * (scores(tq, k) + scores(q, tk)) - tnorm[..., None])
    m = tp * w + p * (scale * (scores(a, tk) + scores(tq, b)))
    return rows(m, v) + rows(p * w, tv) + rows(tp, c), m.sum(-1)


FORMULAS: dict[str, Callable[..., tuple[jax.Array, ...]]] = {
    "lin": lin,
    "bwd": bwd,
    "hess": hess,
    "adj": adj,
    "lin2": lin2,
}

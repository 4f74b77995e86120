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

Every output is a sum over the columns or the rows of the tile: a sum over tiles is the whole. An
operand that is None is zero and takes no product; an output that is None is zero.

Alphabet: `n` batch times key heads, `g` query heads that share a key head, `i` queries, `j` keys.
Row operands `(n, g, i, d)`, columns `(n, j, d)`, statistics `(n, g, i)`, scores `(n, g, i, j)`; or
one head's `(i, d)`, `(j, d)`, `(i,)` and `(i, j)`, which is what a program of a GPU holds. Products
accumulate in float32 or wider; those with weights round the weights to the operand's dtype.

References:
  Dao, 2024, https://arxiv.org/abs/2307.08691, section 3.1 (fwd and bwd in tiles).
  Pearlmutter, 1994, https://doi.org/10.1162/neco.1994.6.1.147 (the tangent of a gradient).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Operands and outputs by kind: q a row operand, k a column operand, r a statistic of each row.
# q, k, v and L are there always; of the others some may be None.
OPERANDS = {
    "fwd": ("qkk", "qr"),
    "lin": ("qkkrqkk", "qr"),
    "bwd": ("qkkrqr", "qkk"),
    "hess": ("qkkrqrqkkrqr", "qkk"),
    "adj": ("qkkrqrqkk", "qkkrqr"),
    "lin2": ("qkkrqkkqkkr", "qr"),
}


# Which axes each product sums over, and which are batches: with heads, and of one head.
_SCORES = (((3,), (2,)), ((0,), (0,))), (((1,), (1,)), ((), ()))
_ROWS = (((3,), (1,)), ((0,), (0,))), (((1,), (0,)), ((), ()))
_COLUMNS = (((1, 2), (1, 2)), ((0,), (0,))), (((0,), (0,)), ((), ()))


def scores(q, k):
    """`q k^T`: `(n, g, i, d)` and `(n, j, d)` to `(n, g, i, j)`."""
    return None if q is None or k is None else _product(q, k, *_SCORES)


def rows(p, k):
    """`p k`: `(n, g, i, j)` and `(n, j, d)` to `(n, g, i, d)`."""
    return None if p is None or k is None else _product(p.astype(k.dtype), k, *_ROWS)


def columns(p, q):
    """`p^T q`, summed over the heads that share a key: to `(n, j, d)`."""
    return None if p is None or q is None else _product(p.astype(q.dtype), q, *_COLUMNS)


def _product(a: jax.Array, b: jax.Array, grouped: Any, single: Any) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    axes = grouped if a.ndim > 2 else single
    return jax.lax.dot_general(a, b, axes, preferred_element_type=wide)


def _sum(*terms):
    """What the terms add up to, those that are zero left out."""
    given = [x for x in terms if x is not None]
    return functools.reduce(jnp.add, given) if given else None


def _times(factor, x):
    return None if factor is None or x is None else factor * x


def _each(x):
    """A statistic of rows, next to scores."""
    return None if x is None else x[..., None]


def _less(x):
    return None if x is None else -x


def _total(x):
    return None if x is None else x.sum(-1)


def probabilities(q, k, norm, scale: float, visible) -> jax.Array:
    """`P`; 0 where `visible` is False, and in rows whose logsumexp is +inf as they see nothing."""
    x = scale * _product(q, k, *_SCORES) - norm[..., None]
    return jnp.exp(x if visible is None else jnp.where(visible, x, -jnp.inf))


# The forward pass keeps a running maximum (Milakov and Gimelshein, 2018, arXiv:1805.02867).


def begin(total, mixed):
    """The state of rows that have seen nothing; `total` and `mixed` are zeros of its shapes."""
    # Finite, so that a row that sees nothing does not subtract inf from inf.
    return jnp.full_like(total, jnp.finfo(total.dtype).min / 2), total, mixed


def absorb(state, q, k, v, scale: float, visible):
    """The state after a tile more."""
    top, total, mixed = state
    x = scale * _product(q, k, *_SCORES)
    x = x if visible is None else jnp.where(visible, x, -jnp.inf)
    higher = jnp.maximum(top, x.max(-1))
    p, fade = jnp.exp(x - higher[..., None]), jnp.exp(top - higher)
    return higher, total * fade + p.sum(-1), mixed * fade[..., None] + rows(p, v)


def finish(state):
    """`o` and `L`; rows that saw nothing give 0 and +inf, so that they weigh nothing later."""
    top, total, mixed = state
    empty = total == 0
    some = jnp.where(empty, 1, total)
    return mixed / some[..., None], jnp.where(empty, jnp.inf, top + jnp.log(some))


def lin(p, scale, q, k, v, norm, a, b, c):
    z = _times(p, _moved(scale, q, k, a, b))
    return _sum(rows(z, v), rows(p, c)), _total(z)


def bwd(p, scale, q, k, v, norm, do, d):
    ds = _times(scale, _times(p, _sum(scores(do, v), _less(_each(d)))))
    return rows(ds, k), columns(ds, q), columns(p, do)


def hess(p, scale, q, k, v, norm, do, d, tq, tk, tv, tnorm, tdo, td):
    x = _sum(scores(do, v), _less(_each(d)))
    ds = _times(scale, _times(p, x))
    tp = _times(p, _sum(_moved(scale, q, k, tq, tk), _less(_each(tnorm))))
    tx = _sum(scores(tdo, v), scores(do, tv), _less(_each(td)))
    tds = _times(scale, _sum(_times(tp, x), _times(p, tx)))
    return (
        _sum(rows(tds, k), rows(ds, tk)),
        _sum(columns(tds, q), columns(ds, tq)),
        _sum(columns(tp, do), columns(p, tdo)),
    )


def adj(p, scale, q, k, v, norm, do, d, a, b, c):
    x = _sum(scores(do, v), _less(_each(d)))
    ds = _times(scale, _times(p, x))
    z = _times(p, _moved(scale, q, k, a, b))
    y = _sum(_times(z, x), _times(p, scores(do, c)))
    return (
        _sum(_times(scale, rows(y, k)), rows(ds, b)),
        _sum(_times(scale, columns(y, q)), columns(ds, a)),
        columns(z, do),
        _less(_total(y)),
        _sum(rows(z, v), rows(p, c)),
        _less(_total(z)),
    )


def lin2(p, scale, q, k, v, norm, a, b, c, tq, tk, tv, tnorm):
    w = _moved(scale, q, k, a, b)
    tp = _times(p, _sum(_moved(scale, q, k, tq, tk), _less(_each(tnorm))))
    across = _times(scale, _sum(scores(a, tk), scores(tq, b)))
    m = _sum(_times(tp, w), _times(p, across))
    return _sum(rows(m, v), rows(_times(p, w), tv), rows(tp, c)), _total(m)


def _moved(scale, q, k, a, b):
    """`W`: how the scores move along `(a, b)`."""
    return _times(scale, _sum(scores(a, k), scores(q, b)))


FORMULAS: dict[str, Callable[..., tuple[jax.Array | None, ...]]] = {
    "lin": lin,
    "bwd": bwd,
    "hess": hess,
    "adj": adj,
    "lin2": lin2,
}

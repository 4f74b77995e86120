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
without `n` and `g`, which is what a program of a GPU holds: `Tile` says which. Products accumulate
in float32 or wider; those with weights round the weights to the operand's dtype.

References:
  Dao, 2024, https://arxiv.org/abs/2307.08691, section 3.1 (fwd and bwd in tiles).
  Pearlmutter, 1994, https://doi.org/10.1162/neco.1994.6.1.147 (the tangent of a gradient).
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a tile of scores lies in memory. What is None is zero in every product and sum.

    Attributes:
      heads: whether `n` and `g` lead.
      turned: whether scores are `(j, i)`, so that sums over queries need no transposition.
    """

    heads: bool = True
    turned: bool = False

    def scores(self, q: Any, k: Any) -> Any:
        """`q k^T`: `(n, g, i, d)` and `(n, j, d)` to `(n, g, i, j)`."""
        if self.turned:
            q, k = k, q
        return self._product(q, k, (3, 2), (1, 1))

    def rows(self, p: Any, k: Any) -> Any:
        """`p k`: `(n, g, i, j)` and `(n, j, d)` to `(n, g, i, d)`."""
        p = p if p is None or k is None else p.astype(k.dtype)
        return self._product(p, k, (3, 1), (0 if self.turned else 1, 0))

    def columns(self, p: Any, q: Any) -> Any:
        """`p^T q`, summed over the heads that share a key: to `(n, j, d)`."""
        p = p if p is None or q is None else p.astype(q.dtype)
        return self._product(p, q, ((1, 2), (1, 2)), (1 if self.turned else 0, 0))

    def each(self, x: Any) -> Any:
        """A statistic of rows `(n, g, i)`, to be broadcast against scores."""
        return None if x is None else x[None] if self.turned else x[..., None]

    def total(self, x: Any) -> Any:
        """Sums of scores over the columns: `(n, g, i)`."""
        return None if x is None else x.sum(0 if self.turned else -1)

    def _product(self, a: Any, b: Any, grouped: tuple[Any, Any], single: tuple[int, int]) -> Any:
        """Sums over an axis of each, or several: `grouped` of them with heads, `single` without."""
        if a is None or b is None:
            return None
        axes = [x if isinstance(x, tuple) else (x,) for x in (grouped if self.heads else single)]
        batch = ((0,), (0,)) if self.heads else ((), ())
        wide = jnp.promote_types(a.dtype, jnp.float32)
        summed = axes[0], axes[1]
        return jax.lax.dot_general(a, b, (summed, batch), preferred_element_type=wide)


HEADS = Tile()


def _sum(*terms):
    """What the terms add up to, those that are zero left out."""
    given = [x for x in terms if x is not None]
    return functools.reduce(jnp.add, given) if given else None


def _times(factor, x):
    return None if factor is None or x is None else factor * x


def _less(x):
    return None if x is None else -x


def probabilities(t: Tile, q, k, norm, scale: float, visible) -> jax.Array:
    """`P`; 0 where `visible` is False, and in rows whose logsumexp is +inf as they see nothing."""
    x = scale * t.scores(q, k) - t.each(norm)
    return jnp.exp(x if visible is None else jnp.where(visible, x, -jnp.inf))


# The forward pass keeps a running maximum (Milakov and Gimelshein, 2018, arXiv:1805.02867).


def begin(total, mixed):
    """The state of rows that have seen nothing; `total` and `mixed` are zeros of its shapes."""
    # Finite, so that a row that sees nothing does not subtract inf from inf.
    return jnp.full_like(total, jnp.finfo(total.dtype).min / 2), total, mixed


def absorb(t: Tile, state, q, k, v, scale: float, visible):
    """The state after a tile more."""
    top, total, mixed = state
    x = scale * t.scores(q, k)
    x = x if visible is None else jnp.where(visible, x, -jnp.inf)
    higher = jnp.maximum(top, x.max(-1))
    p, fade = jnp.exp(x - higher[..., None]), jnp.exp(top - higher)
    return higher, total * fade + p.sum(-1), mixed * fade[..., None] + t.rows(p, v)


def finish(state):
    """`o` and `L`; rows that saw nothing give 0 and +inf, so that they weigh nothing later."""
    top, total, mixed = state
    empty = total == 0
    some = jnp.where(empty, 1, total)
    return mixed / some[..., None], jnp.where(empty, jnp.inf, top + jnp.log(some))


def lin(t, p, scale, q, k, v, norm, a, b, c):
    z = _times(p, _moved(t, scale, q, k, a, b))
    return _sum(t.rows(z, v), t.rows(p, c)), t.total(z)


def bwd(t, p, scale, q, k, v, norm, do, d):
    ds = _times(scale, _times(p, _sum(t.scores(do, v), _less(t.each(d)))))
    return t.rows(ds, k), t.columns(ds, q), t.columns(p, do)


def hess(t, p, scale, q, k, v, norm, do, d, tq, tk, tv, tnorm, tdo, td):
    x = _sum(t.scores(do, v), _less(t.each(d)))
    ds = _times(scale, _times(p, x))
    tp = _times(p, _sum(_moved(t, scale, q, k, tq, tk), _less(t.each(tnorm))))
    tx = _sum(t.scores(tdo, v), t.scores(do, tv), _less(t.each(td)))
    tds = _times(scale, _sum(_times(tp, x), _times(p, tx)))
    return (
        _sum(t.rows(tds, k), t.rows(ds, tk)),
        _sum(t.columns(tds, q), t.columns(ds, tq)),
        _sum(t.columns(tp, do), t.columns(p, tdo)),
    )


def adj(t, p, scale, q, k, v, norm, do, d, a, b, c):
    x = _sum(t.scores(do, v), _less(t.each(d)))
    ds = _times(scale, _times(p, x))
    z = _times(p, _moved(t, scale, q, k, a, b))
    y = _sum(_times(z, x), _times(p, t.scores(do, c)))
    return (
        _sum(_times(scale, t.rows(y, k)), t.rows(ds, b)),
        _sum(_times(scale, t.columns(y, q)), t.columns(ds, a)),
        t.columns(z, do),
        _less(t.total(y)),
        _sum(t.rows(z, v), t.rows(p, c)),
        _less(t.total(z)),
    )


def lin2(t, p, scale, q, k, v, norm, a, b, c, tq, tk, tv, tnorm):
    w = _moved(t, scale, q, k, a, b)
    tp = _times(p, _sum(_moved(t, scale, q, k, tq, tk), _less(t.each(tnorm))))
    across = _times(scale, _sum(t.scores(a, tk), t.scores(tq, b)))
    m = _sum(_times(tp, w), _times(p, across))
    return _sum(t.rows(m, v), t.rows(_times(p, w), tv), t.rows(tp, c)), t.total(m)


def _moved(t, scale, q, k, a, b):
    """`W`: how the scores move along `(a, b)`."""
    return _times(scale, _sum(t.scores(a, k), t.scores(q, b)))


FORMULAS: dict[str, Callable[..., tuple[jax.Array | None, ...]]] = {
    "lin": lin,
    "bwd": bwd,
    "hess": hess,
    "adj": adj,
    "lin2": lin2,
}

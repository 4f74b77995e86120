"""Cross-entropy of next tokens that never holds the logits of the whole batch, at either order.

Logits are the largest array of a language model: positions x vocabulary. They are computed for a
chunk of positions at a time, and every derivative computes them again; of a chunk only the
logsumexp is kept, one number a position. With `S = h E^T` the logits of a chunk, `L` their
logsumexp, `P = exp(S - L)`, `Y` the one-hot targets and `W = a E^T + h b^T` the tangent of `S`
along `(a, b)`, five primitives are closed under differentiation:

    loss     (h, E)             L - rowsum(Y S)
    slope    (h, E | a, b)      rowsum((P - Y) W)                       its derivative along (a, b)
    pull     (h, E | g)         G E, G^T h  with  G = g (P - Y)         slope^T = pull, and back
    hessian  (h, E, g | a, b)   M E + G b, M^T h + G^T a                pull along (a, b); symmetric
                                with  M = g P (W - rowsum(P W))
    twice    (h, E, a, b | p, q)  the second derivative along (a, b) and (p, q); its transpose and
                                that of hessian in g are hessian and twice

`L` is passed on, never differentiated: the rules are the total derivatives. Primitives rather than
`jax.custom_jvp` and `jax.checkpoint`, because reverse over reverse strips both from the forward
pass and keeps the logits of every chunk wherever what is differentiated depends on the losses, and
because they keep fewer arrays of a chunk (`bench/records/second_order.json`). Third
derivatives are those of the formulas, in the memory that this takes.

Cost in products of `N x V x D`, in chunks (and in one piece, where XLA computes nothing again):
loss 1, gradient 4 (3), jvp 3, jvp of gradient 11 (8) where the gradient itself is not asked for.
Memory: a few chunks of logits, and O(N D).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metagrad_filter.errors import ConfigError

# Up to here one piece: keeping its logits beats computing them again. Smaller pieces are slower on
# CPU once the vocabulary is large, each of them reads the whole embedding.
_CHUNK_BYTES = 64 << 20


def token_cross_entropy(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, *, chunk: int | None = None
) -> jax.Array:
    """Negative log-likelihood of each target token.

    Differentiable in `hidden` and `embedding`, in any mode and to any order. Chunks are strided
    (every k-th position), so that where the batch is sharded over devices each device holds its
    part of every chunk.

    Args:
      hidden: `(N, D)` final hidden states.
      embedding: `(V, D)` output embedding; logits are `hidden @ embedding.T`.
      targets: `(N,)` integer token ids in `[0, V)`.
      chunk: positions per piece; default: as many as fit 64 MiB of logits. Under `vmap` over K
        tangents a chunk's tangent takes K times that.

    Returns:
      `(N,)` nats per token, in float32 or wider; logits of narrower inputs accumulate in float32.

    Raises:
      ConfigError: the shapes do not fit, targets are not integers, or `chunk` is not positive.

    References:
      Dauvergne and Hascoet, 2006, https://doi.org/10.1007/11758549_78 (recomputation).
      Pearlmutter, 1994, https://doi.org/10.1162/neco.1994.6.1.147 (products with the Hessian).
    """
    _check(hidden, embedding, targets, chunk)
    dtype = jnp.promote_types(hidden.dtype, embedding.dtype)
    hidden, embedding = hidden.astype(dtype), embedding.astype(dtype)
    count = hidden.shape[0]
    if chunk is None:
        itemsize = jnp.promote_types(dtype, jnp.float32).itemsize
        chunk = max(1, _CHUNK_BYTES // (embedding.shape[0] * itemsize))
    if chunk >= count:
        return _bind("loss", hidden, embedding, targets)[0]
    pieces = -(-count // chunk)
    padding = -count % pieces
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, pieces, hidden.shape[1])
    targets = jnp.pad(targets, (0, padding)).reshape(-1, pieces)
    losses = jax.lax.map(
        lambda x: _bind("loss", x[0], embedding, x[1])[0],
        (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)),
    )
    return losses.swapaxes(0, 1).reshape(-1)[:count]


# The formulas, for one chunk: h (n, D), e (V, D), t (n,), norm (n,), g (n,); a, p like h; b, q
# like e.


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Contracts an axis of each; operands in the dtype of `y`, the sum in float32 or wider."""
    dims = (((over[0],), (over[1],)), ((), ()))
    width = jnp.promote_types(y.dtype, jnp.float32)
    return jax.lax.dot_general(x.astype(y.dtype), y, dims, preferred_element_type=width)


def _excess(h, e, t, norm):
    """`P` and `P - Y`."""
    p = jnp.exp(_dot(h, e, (1, 1)) - norm[:, None])
    # A comparison fuses into the loops over the logits, a scatter into them does not.
    return p, p - (jax.lax.broadcasted_iota(t.dtype, p.shape, 1) == t[:, None])


def _along(h, e, a, b):
    return _dot(a, e, (1, 1)) + _dot(h, b, (1, 1))


def _loss(h, e, t):
    logits = _dot(h, e, (1, 1))
    norm = jax.nn.logsumexp(logits, axis=1)
    return [norm - jnp.take_along_axis(logits, t[:, None], axis=1)[:, 0], norm]


def _slope(h, e, t, norm, a, b):
    return [jnp.sum(_excess(h, e, t, norm)[1] * _along(h, e, a, b), axis=1)]


def _pull(h, e, t, norm, g):
    grad = g[:, None] * _excess(h, e, t, norm)[1]
    return [_dot(grad, e, (1, 0)).astype(h.dtype), _dot(grad, h, (0, 0)).astype(e.dtype)]


def _hessian(h, e, t, norm, g, a, b):
    p, excess = _excess(h, e, t, norm)
    w = _along(h, e, a, b)
    grad = g[:, None] * excess
    turn = g[:, None] * (p * (w - jnp.sum(p * w, axis=1, keepdims=True)))
    to_hidden = _dot(turn, e, (1, 0)) + _dot(grad, b, (1, 0))
    to_embedding = _dot(turn, h, (0, 0)) + _dot(grad, a, (0, 0))
    return [to_hidden.astype(h.dtype), to_embedding.astype(e.dtype)]


def _twice(h, e, t, norm, a, b, p, q):
    prob, excess = _excess(h, e, t, norm)
    w = _along(h, e, a, b)
    turn = prob * (w - jnp.sum(prob * w, axis=1, keepdims=True))
    mixed = _dot(a, q, (1, 1)) + _dot(p, b, (1, 1))
    return [jnp.sum(turn * _along(h, e, p, q) + excess * mixed, axis=1)]


_FORMULAS: dict[str, Callable[..., list[jax.Array]]] = {
    "loss": _loss,
    "slope": _slope,
    "pull": _pull,
    "hessian": _hessian,
    "twice": _twice,
}


# Rules without batch axes. A tangent or cotangent that is None is zero, or not asked for.


def _push(name: str, args: Sequence[Any], tangents: Sequence[Any], out) -> list[jax.Array]:
    """Tangents of the outputs `out`."""
    h, e, t, *rest = args
    moved, linear = tangents[:2], tangents[4:]
    along = tuple(jnp.zeros_like(x) if d is None else d for x, d in zip((h, e), moved))
    if name == "loss":
        return [_bind("slope", h, e, t, out[1], *along)[0], jnp.zeros_like(out[1])]
    terms = []
    if any(d is not None for d in moved):
        if name == "slope":
            terms.append(_bind("twice", *args, *along))
        elif name == "pull":
            terms.append(_bind("hessian", *args, *along))
        else:
            terms.append(jax.jvp(lambda h, e: _total(name, h, e, t, *rest[1:]), (h, e), along)[1])
    # What is linear comes in groups: (a, b), g alone, (p, q).
    groups = {"slope": [2], "pull": [1], "hessian": [1, 2], "twice": [2, 2]}[name]
    start = 0
    for size in groups:
        group = range(start, start + size)
        if any(linear[i] is not None for i in group):
            operands = list(rest[1:])
            for i in group:
                zero = jnp.zeros_like(operands[i])
                operands[i] = zero if linear[i] is None else linear[i]
            terms.append(_bind(name, h, e, t, rest[0], *operands))
        start += size
    return [functools.reduce(jnp.add, parts) for parts in zip(*terms)]


def _total(name, h, e, t, *operands):
    """The formula as a function of `h` and `e` alone, for derivatives beyond the second."""
    norm = jax.nn.logsumexp(_dot(h, e, (1, 1)), axis=1)
    return _FORMULAS[name](h, e, t, norm, *operands)


def _transpose(name: str, unknown: int, cotangents, args: Sequence[Any]) -> dict[int, jax.Array]:
    """Cotangents, by position, of the group of linear operands to which `unknown` belongs."""
    context, operands = args[:4], args[4:]
    if name == "slope":
        return dict(zip((4, 5), _bind("pull", *context, *cotangents)))
    if name == "pull":
        return {4: _bind("slope", *context, *cotangents)[0]}
    if name == "hessian" and unknown == 4:
        return {4: _bind("twice", *context, *cotangents, *operands[1:])[0]}
    if name == "hessian":
        return dict(zip((5, 6), _bind("hessian", *context, operands[0], *cotangents)))
    group, other = ((4, 5), operands[2:]) if unknown < 6 else ((6, 7), operands[:2])
    return dict(zip(group, _bind("hessian", *context, *cotangents, *other)))


# Binding to jax. `axes` lists, innermost first, which operands (0 or None) each vmap maps over: an
# operand that a vmap does not map is computed with once, and the rules are those above, mapped.


def _batched(name: str, axes: tuple) -> Callable[..., list[jax.Array]]:
    run = _FORMULAS[name]
    for level in axes:
        run = jax.vmap(run, in_axes=level)
    return run


@functools.cache
def _compiled(name: str, axes: tuple):
    return jax.jit(_batched(name, axes))


def _bind(name: str, *args: jax.Array, axes: tuple = ()) -> list[jax.Array]:
    return _PRIMITIVES[name].bind(*args, axes=axes)


def _jvp_rule(name: str, args, tangents, *, axes):
    live = [i for i, x in enumerate(tangents) if type(x) is not ad.Zero and i not in (2, 3)]
    values = [tangents[i] for i in live]

    def run(args, values, out, axes):
        if axes:
            level = axes[-1]
            inner = functools.partial(run, axes=axes[:-1])
            mapped = jax.vmap(inner, in_axes=(level, [level[i] for i in live], 0))
            return mapped(args, values, out)
        padded: list[Any] = [None] * max(len(args), 4)
        for i, value in zip(live, values):
            padded[i] = value
        return _push(name, args, padded, out)

    out = _bind(name, *args, axes=axes)
    if not live:
        return out, [jnp.zeros_like(x) for x in out]
    return out, run(tuple(args), values, out, axes)


def _transpose_rule(name: str, cotangents, *args, axes):
    unknown = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]
    known = [i for i in range(len(args)) if i not in unknown]

    def run(cotangents, values, axes):
        if axes:
            level = axes[-1]
            inner = functools.partial(run, axes=axes[:-1])
            mapped = jax.vmap(inner, in_axes=(0, [level[i] for i in known]))
            found = mapped(cotangents, values)
            return [x.sum(0) if level[i] is None else x for i, x in zip(unknown, found)]
        padded: list[Any] = [None] * len(args)
        for i, value in zip(known, values):
            padded[i] = value
        found = _transpose(name, unknown[0], cotangents, padded)
        return [found[i] for i in unknown]

    values = [args[i] for i in known]
    found = run([ad.instantiate_zeros(c) for c in cotangents], values, axes)
    out: list[Any] = [None] * len(args)
    for i, value in zip(unknown, found):
        out[i] = value
    return out


def _batch_rule(name: str, args, dims, *, axes):
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims)]
    level = tuple(None if d is None else 0 for d in dims)
    out = _bind(name, *moved, axes=(*axes, level))
    return out, [0] * len(out)


def _shapes(name: str, *operands, axes):
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    found = jax.eval_shape(_batched(name, axes), *arrays)
    return [ShapedArray(x.shape, x.dtype) for x in found]


def _primitive(name: str) -> Primitive:
    primitive = Primitive(f"cross_entropy_{name}")
    primitive.multiple_results = True
    primitive.def_impl(lambda *args, axes: _compiled(name, axes)(*args))
    primitive.def_abstract_eval(functools.partial(_shapes, name))
    mlir.register_lowering(
        primitive,
        mlir.lower_fun(lambda *args, axes: _batched(name, axes)(*args), multiple_results=True),
    )
    ad.primitive_jvps[primitive] = functools.partial(_jvp_rule, name)
    if name != "loss":
        ad.primitive_transposes[primitive] = functools.partial(_transpose_rule, name)
    batching.primitive_batchers[primitive] = functools.partial(_batch_rule, name)
    return primitive


_PRIMITIVES = {name: _primitive(name) for name in _FORMULAS}


def _check(hidden, embedding, targets, chunk) -> None:
    shapes = f"hidden {hidden.shape}, embedding {embedding.shape} and targets {targets.shape}"
    fits = hidden.ndim == embedding.ndim == 2 and hidden.shape[1] == embedding.shape[1]
    if not fits or targets.shape != hidden.shape[:1] or embedding.shape[0] == 0:
        raise ConfigError(
            f"{shapes} do not fit; expected (N, D), (V, D) and (N,): flatten windows and positions "
            "into one axis."
        )
    for name, x in (("hidden", hidden), ("embedding", embedding)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigError(f"{name} has dtype {x.dtype}; expected a floating-point array.")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ConfigError(f"targets have dtype {targets.dtype}; expected integer token ids.")
    whole = isinstance(chunk, int) and not isinstance(chunk, bool)
    if chunk is not None and not (whole and chunk >= 1):
        raise ConfigError(f"chunk={chunk!r}; expected a positive int or None.")

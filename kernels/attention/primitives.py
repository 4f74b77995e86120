"""Six jax primitives that are closed under differentiation.

    bind("bwd", q, k, v, norm, do, d, pattern=..., implementation="chunked") -> [dq, dk, dv]

Operands and outputs are those of `formulas.OPERANDS`, by kind: q `(B, S, H, d)`, k
`(B, S_k, H_kv, d)` and r `(B, H, S)`; segment ids `(B, S)` may follow as one more operand. Outputs
of kinds q and k have the dtype of the operands, those of kind r are float32, or float64 where the
operands are. Rules of differentiation:

    fwd  tangent lin                            transposes  lin <-> bwd, hess <-> adj
    lin  tangent lin2 (q, k, v, L), lin (rest)              lin2 -> adj
    bwd  tangent hess, or bwd where only (do, D) move

The tangents of hess, adj and lin2 in what they are not linear in are third derivatives: those of
the reference, in its O(S S_k) memory. Under `vmap` the mapped axis joins B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metagrad_filter.kernels.attention import (  # pyright: ignore[reportMissingImports]
    _jax,
    reference,
)
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.implementations import (  # pyright: ignore[reportMissingImports]
    IMPLEMENTATIONS,
)
from metagrad_filter.kernels.attention.partitioning import partitioned  # pyright: ignore[reportMissingImports]

_NORM = 3  # the position of the logsumexp wherever it is an operand


def bind(name: str, *operands: Any, **static: Any) -> list[jax.Array]:
    """Computes a primitive; `static` is `pattern` and `implementation`."""
    return PRIMITIVES[name].bind(*_jax.align(operands), **static)


# Derivatives. Segment ids, where there are any, end the operands; nothing differentiates in them.


def _zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def _full(tangents: Sequence[Any]) -> list[Any]:
    return [ad.instantiate_zeros(t) for t in tangents]


def _fwd_jvp(operands, tangents, **static):
    qkv, ids = operands[:3], operands[3:]
    o, norm = bind("fwd", *operands, **static)
    if all(map(_zero, tangents)):
        return [o, norm], _sum([o, norm], [])
    u, r = bind("lin", *qkv, norm, *_full(tangents[:3]), *ids, **static)
    moved = u.astype(r.dtype) - r.swapaxes(1, 2)[..., None] * o.astype(r.dtype)
    return [o, norm], [moved.astype(o.dtype), r]


def _lin_jvp(operands, tangents, **static):
    known, ids = operands[:4], operands[7:]
    out = bind("lin", *operands, **static)
    terms = []
    if not all(map(_zero, tangents[:4])):
        terms.append(bind("lin2", *operands[:7], *_full(tangents[:4]), *ids, **static))
    if not all(map(_zero, tangents[4:7])):
        terms.append(bind("lin", *known, *_full(tangents[4:7]), *ids, **static))
    return out, _sum(out, terms)


def _bwd_jvp(operands, tangents, **static):
    known, ids = operands[:4], operands[6:]
    out = bind("bwd", *operands, **static)
    if all(map(_zero, tangents)):
        return out, _sum(out, [])
    if all(map(_zero, tangents[:4])):
        return out, bind("bwd", *known, *_full(tangents[4:6]), *ids, **static)
    return out, bind("hess", *operands[:6], *_full(tangents[:6]), *ids, **static)


def _linear_jvp(name: str, known: int, operands, tangents, **static):
    """hess, adj and lin2: linear in all operands after the first `known`."""
    count = len(OPERANDS[name][0])
    ids = operands[count:]
    out = bind(name, *operands, **static)
    terms = []
    if not all(map(_zero, tangents[:known])):
        terms.append(_third(name, known, operands, tangents, **static))
    if not all(map(_zero, tangents[known:count])):
        along = _full(tangents[known:count])
        terms.append(bind(name, *operands[:known], *along, *ids, **static))
    return out, _sum(out, terms)


def _third(name: str, known: int, operands, tangents, *, pattern, implementation):
    del implementation

    def formula(*moved):
        return reference.run(name, pattern, *moved, *operands[known:])

    return jax.jvp(formula, tuple(operands[:known]), tuple(_full(tangents[:known])))[1]


def _sum(out, terms):
    if not terms:
        zero = ad.Zero.from_primal_value  # pyright: ignore[reportAttributeAccessIssue]
        return [zero(x) for x in out]
    return [functools.reduce(jnp.add, parts) for parts in zip(*terms)]


def _cotangents(operands, start: int, found) -> list[Any]:
    """Cotangents of the operands from `start` on, for those of them that are asked for."""
    asked = [ad.is_undefined_primal(x) for x in operands]
    placed = [None] * start + list(found)
    placed += [None] * (len(operands) - len(placed))
    return [x if wanted else None for x, wanted in zip(placed, asked)]


def _lin_transpose(cotangents, *operands, **static):
    du, dr = _full(cotangents)
    found = bind("bwd", *operands[:4], du, -dr, *operands[7:], **static)
    return _cotangents(operands, 4, found)


def _bwd_transpose(cotangents, *operands, **static):
    u, r = bind("lin", *operands[:4], *_full(cotangents), *operands[6:], **static)
    return _cotangents(operands, 4, [u, -r])


def _hess_transpose(cotangents, *operands, **static):
    found = bind("adj", *operands[:6], *_full(cotangents), *operands[12:], **static)
    return _cotangents(operands, 6, found)


def _adj_transpose(cotangents, *operands, **static):
    found = bind("hess", *operands[:6], *_full(cotangents), *operands[9:], **static)
    return _cotangents(operands, 6, found)


def _lin2_transpose(cotangents, *operands, **static):
    du, dr = _full(cotangents)
    found = bind("adj", *operands[:4], du, -dr, *operands[4:7], *operands[11:], **static)
    return _cotangents(operands, 7, found[:4])


_TANGENTS: dict[str, Callable[..., Any]] = {
    "fwd": _fwd_jvp,
    "lin": _lin_jvp,
    "bwd": _bwd_jvp,
    "hess": functools.partial(_linear_jvp, "hess", 6),
    "adj": functools.partial(_linear_jvp, "adj", 6),
    "lin2": functools.partial(_linear_jvp, "lin2", 7),
}
_TRANSPOSES: dict[str, Callable[..., Any]] = {
    "lin": _lin_transpose,
    "bwd": _bwd_transpose,
    "hess": _hess_transpose,
    "adj": _adj_transpose,
    "lin2": _lin2_transpose,
}


# Binding to jax.


def _abstract(name: str, *operands, pattern, implementation):
    del pattern, implementation
    q, k = operands[:2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    known = {
        "q": (q.shape, q.dtype),
        "k": (k.shape, q.dtype),
        "r": ((q.shape[0], q.shape[2], q.shape[1]), wide),
    }
    return [_jax.output(f"attention_{name}", operands, *known[kind]) for kind in OPERANDS[name][1]]


def _batch(name: str, operands, dims, **static):
    # The mapped axis becomes the minor part of B: a batch that is split over devices stays so.
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    joined = []
    for x, d in zip(operands, dims):
        if d is None:
            x = jnp.broadcast_to(x[:, None], (x.shape[0], size, *x.shape[1:]))
        else:
            x = jnp.moveaxis(x, d, 1)
        joined.append(x.reshape(-1, *x.shape[2:]))
    out = bind(name, *joined, **static)
    return [x.reshape(-1, size, *x.shape[1:]) for x in out], [1] * len(out)


@functools.cache
def _compiled(name: str, **static):
    return jax.jit(lambda *operands: PRIMITIVES[name].bind(*operands, **static))


def _lowering(name: str, on_cpu: bool) -> Callable[..., Any]:
    def lowered(*operands, pattern, implementation):
        chosen = IMPLEMENTATIONS[implementation]
        run = functools.partial(chosen.cpu if on_cpu else chosen.device, name, pattern)
        return partitioned(name, run, operands)

    return mlir.lower_fun(lowered, multiple_results=True)


def _primitive(name: str) -> Primitive:
    primitive = Primitive(f"attention_{name}")
    primitive.multiple_results = True
    primitive.def_impl(lambda *operands, **static: _compiled(name, **static)(*operands))
    primitive.def_abstract_eval(functools.partial(_abstract, name))
    mlir.register_lowering(primitive, _lowering(name, on_cpu=False))
    mlir.register_lowering(primitive, _lowering(name, on_cpu=True), platform="cpu")
    _jax.lower_with_devices(primitive)
    ad.primitive_jvps[primitive] = _TANGENTS[name]
    if name in _TRANSPOSES:
        ad.primitive_transposes[primitive] = _TRANSPOSES[name]
    batching.primitive_batchers[primitive] = functools.partial(_batch, name)
    return primitive


PRIMITIVES = {name: _primitive(name) for name in OPERANDS}

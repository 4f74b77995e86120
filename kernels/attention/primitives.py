"""Six jax primitives that are closed under differentiation.

    bind("bwd", q, k, v, norm, do, d, pattern=..., implementation="chunked") -> [dq, dk, dv]

Operands and outputs are those of `formulas.OPERANDS`, by kind: q `(B, S, H, d)`, k
`(B, S_k, H_kv, d)` and r `(B, H, S)`; segment ids `(B, S)` may follow as one more operand. Outputs
of kinds q and k have the dtype of the operands, those of kind r are float32, or float64 where the
operands are. Tangents that are zero and cotangents that nobody asks for are left out (`parts.py`).
Rules of differentiation:

    fwd  tangent lin                            transposes  lin <-> bwd, hess <-> adj
    lin  tangent lin2 (q, k, v, L), lin (rest)              lin2 -> adj
    bwd  tangent hess, or bwd where only (do, D) move

The tangents of hess, adj and lin2 in what they are not linear in are third derivatives: those of
the reference, in its O(S S_k) memory. Under `vmap` the mapped axis joins B.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metagrad_filter.kernels.attention import (  # pyright: ignore[reportMissingImports]
    _jax,
    parts,
    reference,
)
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.implementations import (  # pyright: ignore[reportMissingImports]
    IMPLEMENTATIONS,
)
from metagrad_filter.kernels.attention.partitioning import partitioned  # pyright: ignore[reportMissingImports]

# Tangents, cotangents and outputs that are None are zero, or nobody asks for them.
Parts = list[Any]


def bind(name: str, *operands: Any, wanted: Sequence[bool] | None = None, **static: Any) -> Parts:
    """Computes a primitive.

    Args:
      name: of `formulas.OPERANDS`.
      *operands: its operands, None for those that are zero; segment ids may follow.
      wanted: which outputs to compute, all by default; the others are None.
      **static: `pattern` and `implementation`.
    """
    given = tuple(x is not None for x in operands[: len(OPERANDS[name][0])])
    wanted = parts.everything(name) if wanted is None else tuple(wanted)
    present = [x for x in operands if x is not None]
    found = PRIMITIVES[name].bind(*_jax.align(present), given=given, wanted=wanted, **static)
    return parts.spread(wanted, found)[0]


# Derivatives. What rules take: `call`, and operands and tangents (cotangents) with None for zero.


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the calls that a rule makes have in common with the one it differentiates."""

    ids: Sequence[Any]
    static: dict[str, Any]

    def run(self, name: str, *operands: Any, wanted: Sequence[bool]) -> Parts:
        return bind(name, *operands, *self.ids, wanted=wanted, **self.static)


def _fwd_tangent(call, out, operands, tangents, wanted):
    del wanted
    o, norm = out
    # Scores that stay where they are leave the logsumexp there.
    moves = any(x is not None for x in tangents[:2])
    u, r = call.run("lin", *operands, norm, *tangents, wanted=(True, moves))
    if r is None:
        return [u, None]
    moved = u.astype(r.dtype) - r.swapaxes(1, 2)[..., None] * o.astype(r.dtype)
    return [moved.astype(o.dtype), r]


def _lin_tangent(call, out, operands, tangents, wanted):
    del out
    known, along = tangents[:4], tangents[4:]
    bent = straight = [None, None]
    if _some(known):
        bent = call.run("lin2", *operands, *known, wanted=wanted)
    if _some(along):
        straight = call.run("lin", *operands[:4], *along, wanted=wanted)
    return _add(bent, straight)


def _bwd_tangent(call, out, operands, tangents, wanted):
    del out
    if _some(tangents[:4]):
        return call.run("hess", *operands, *tangents, wanted=wanted)
    return call.run("bwd", *operands[:4], *tangents[4:], wanted=wanted)


def _linear_tangent(name: str, known: int, call, out, operands, tangents, wanted):
    """hess, adj and lin2: linear in all operands after the first `known`."""
    bent = straight = [None] * len(out)
    if _some(tangents[:known]):
        bent = _third(call, name, operands, tangents[:known], wanted)
    if _some(tangents[known:]):
        straight = call.run(name, *operands[:known], *tangents[known:], wanted=wanted)
    return _add(bent, straight)


def _third(call, name: str, operands, tangents, wanted) -> Parts:
    """The reference's own tangent, in its memory."""
    moving = [i for i, x in enumerate(tangents) if x is not None]
    pattern = call.static["pattern"]

    def formula(*moved):
        inputs = list(operands)
        for i, x in zip(moving, moved):
            inputs[i] = x
        return reference.run(name, pattern, *inputs, *call.ids, wanted=wanted)

    primals, along = ([x[i] for i in moving] for x in (operands, tangents))
    return parts.spread(wanted, jax.jvp(formula, primals, along)[1])[0]


def _lin_transpose(call, operands, cotangents, asked):
    du, dr = cotangents
    return 4, call.run("bwd", *operands[:4], du, _minus(dr), wanted=asked[4:])


def _bwd_transpose(call, operands, cotangents, asked):
    u, r = call.run("lin", *operands[:4], *cotangents, wanted=asked[4:])
    return 4, [u, _minus(r)]


def _hess_transpose(call, operands, cotangents, asked):
    return 6, call.run("adj", *operands[:6], *cotangents, wanted=asked[6:])


def _adj_transpose(call, operands, cotangents, asked):
    return 6, call.run("hess", *operands[:6], *cotangents, wanted=asked[6:])


def _lin2_transpose(call, operands, cotangents, asked):
    du, dr = cotangents
    wanted = (*asked[7:], False, False)
    found = call.run("adj", *operands[:4], du, _minus(dr), *operands[4:7], wanted=wanted)
    return 7, found[:4]


_TANGENTS: dict[str, Callable[..., Parts]] = {
    "fwd": _fwd_tangent,
    "lin": _lin_tangent,
    "bwd": _bwd_tangent,
    "hess": functools.partial(_linear_tangent, "hess", 6),
    "adj": functools.partial(_linear_tangent, "adj", 6),
    "lin2": functools.partial(_linear_tangent, "lin2", 7),
}
# Each returns the position of the first operand that it has cotangents for, and those.
_TRANSPOSES: dict[str, Callable[..., tuple[int, Parts]]] = {
    "lin": _lin_transpose,
    "bwd": _bwd_transpose,
    "hess": _hess_transpose,
    "adj": _adj_transpose,
    "lin2": _lin2_transpose,
}


def _some(tangents: Sequence[Any]) -> bool:
    return any(x is not None for x in tangents)


def _add(first: Sequence[Any], second: Sequence[Any]) -> Parts:
    return [x if y is None else y if x is None else x + y for x, y in zip(first, second)]


def _minus(x: Any) -> Any:
    return None if x is None else -x


def _unless_zero(x: Any) -> Any:
    return None if type(x) is ad.Zero else x


# Binding to jax.


def _jvp(name: str, present, tangents, *, given, wanted, **static):
    operands, ids = parts.spread(given, present)
    moved = parts.spread(given, [_unless_zero(t) for t in tangents])[0]
    out = bind(name, *operands, *ids, wanted=wanted, **static)
    along: Parts = [None] * len(out)
    if _some(moved):
        along = _TANGENTS[name](_Call(ids, static), out, operands, moved, wanted)
    out, along = parts.chosen(wanted, out), parts.chosen(wanted, along)
    return out, [_jax.zero_tangent(x) if t is None else t for x, t in zip(out, along)]


def _transpose(name: str, cotangents, *present, given, wanted, **static):
    operands, ids = parts.spread(given, present)
    asked = tuple(ad.is_undefined_primal(x) for x in operands)
    flowing = parts.spread(wanted, [_unless_zero(x) for x in cotangents])[0]
    start, found = _TRANSPOSES[name](_Call(ids, static), operands, flowing, asked)
    return [*parts.chosen(given, [None] * start + found), *(None for _ in ids)]


def _abstract(name: str, *present, pattern, implementation, given, wanted):
    del pattern, implementation, given
    q, k = present[:2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    known = {
        "q": (q.shape, q.dtype),
        "k": (k.shape, q.dtype),
        "r": ((q.shape[0], q.shape[2], q.shape[1]), wide),
    }
    kinds = parts.chosen(wanted, OPERANDS[name][1])
    return [_jax.output(f"attention_{name}", present, *known[kind]) for kind in kinds]


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
    out = PRIMITIVES[name].bind(*_jax.align(joined), **static)
    return [x.reshape(-1, size, *x.shape[1:]) for x in out], [1] * len(out)


@functools.cache
def _compiled(name: str, **static):
    return jax.jit(lambda *operands: PRIMITIVES[name].bind(*operands, **static))


def _lowering(name: str, on_cpu: bool) -> Callable[..., Any]:
    def lowered(*present, pattern, implementation, given, wanted):
        chosen = IMPLEMENTATIONS[implementation]
        run = chosen.cpu if on_cpu else chosen.device
        run = run if chosen.partial else parts.of_whole(run)

        def local(*present):
            operands, ids = parts.spread(given, present)
            return run(name, pattern, *operands, *ids, wanted=wanted)

        return partitioned(name, local, present, given, wanted)

    return mlir.lower_fun(lowered, multiple_results=True)


def _primitive(name: str) -> Primitive:
    primitive = Primitive(f"attention_{name}")
    primitive.multiple_results = True
    primitive.def_impl(lambda *operands, **static: _compiled(name, **static)(*operands))
    primitive.def_abstract_eval(functools.partial(_abstract, name))
    mlir.register_lowering(primitive, _lowering(name, on_cpu=False))
    mlir.register_lowering(primitive, _lowering(name, on_cpu=True), platform="cpu")
    _jax.lower_with_devices(primitive)
    ad.primitive_jvps[primitive] = functools.partial(_jvp, name)
    if name in _TRANSPOSES:
        ad.primitive_transposes[primitive] = functools.partial(_transpose, name)
    batching.primitive_batchers[primitive] = functools.partial(_batch, name)
    return primitive


PRIMITIVES = {name: _primitive(name) for name in OPERANDS}

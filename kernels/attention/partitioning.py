"""One primitive over several devices: batch and key heads stay where they are.

Under `jit` with sharded operands the compiler asks this rule how to split a primitive: axes B and
H_kv are independent, so each device runs its part and nothing is gathered; sequences and head
dimensions are brought together first. Under `shard_map` the code already is per device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from metagrad_filter.kernels.attention import _jax, parts  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]

_AXES = {"q": "b s {h} d", "k": "b t k d", "r": "b {h} s", "i": "b s"}


def partitioned(
    name: str,
    run: Callable[..., Any],
    operands: Sequence[jax.Array],
    given: Sequence[bool],
    wanted: Sequence[bool],
) -> list[jax.Array]:
    """Computes `run(*operands)`, split over devices as the operands are; flags as in `parts`."""
    kinds = parts.kinds_of(name, given, len(operands))
    outputs = "".join(parts.chosen(wanted, OPERANDS[name][1]))
    q, k = operands[:2]
    groups = q.shape[2] // k.shape[2]
    # Query heads are ordered by the key head that serves them.
    heads = "k" if groups == 1 else "(k g)"
    terms = [", ".join(_AXES[kind].format(h=heads) for kind in side) for side in (kinds, outputs)]
    # In the order in which the rule names them.
    whole = ("s", "d", "t") if groups == 1 else ("s", "g", "d", "t")
    sizes: dict[str, Any] = {} if groups == 1 else {"g": groups}

    def local(*operands):
        return tuple(run(*operands))

    function = custom_partitioning(local)
    function.def_partition(
        partition=functools.partial(_partition, local, kinds, outputs, k.shape[2]),
        infer_sharding_from_operands=lambda mesh, operands, results: _shardings(
            mesh, operands, outputs, k.shape[2]
        ),
        decode_shardings=False,  # jax refuses those that `_jax.spec_of` calls whole
        sharding_rule=" -> ".join(terms),
        need_replication_factors=whole,
        **sizes,
    )
    return list(function(*operands))


def _partition(local, kinds, outputs, key_heads, mesh, operands, results):
    del results
    return (
        mesh,
        local,
        _shardings(mesh, operands, outputs, key_heads),
        _shardings(mesh, operands, kinds, key_heads),
    )


def _shardings(mesh, operands, kinds: str, key_heads: int) -> tuple[NamedSharding, ...]:
    """Shardings of arrays of these kinds: those of the keys' batch and heads, whole otherwise."""
    spec = (*_jax.spec_of(operands[1].sharding, mesh, 4), None, None, None, None)
    batch, heads = spec[0], spec[2]
    axes = (heads,) if isinstance(heads, str) else (heads or ())
    if key_heads % max(1, functools.reduce(lambda n, axis: n * mesh.shape[axis], axes, 1)):
        heads = None
    specs = {
        "q": PartitionSpec(batch, None, heads, None),
        "k": PartitionSpec(batch, None, heads, None),
        "r": PartitionSpec(batch, heads, None),
        "i": PartitionSpec(batch, None),
    }
    return tuple(NamedSharding(mesh, specs[kind]) for kind in kinds)

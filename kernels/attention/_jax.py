"""What this package takes from jax beyond its documented interface, all of it in this file.

Holds for jax 0.10 and 0.11. The documented part (`jax.extend.core.Primitive`,
`jax.interpreters.{ad, batching, mlir}`) is used where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax._src import core, dispatch, sharding_impls
from jax.extend.core import Primitive
from jax.interpreters import ad
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding


def align(arrays: Sequence[Any]) -> list[Any]:
    """Marks all operands as varying over the manual mesh axes that any of them varies over."""
    varying = [frozenset(jax.typeof(x).mat.varying) for x in arrays]
    every = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(every - mine)), to="varying") if every - mine else x
        for x, mine in zip(arrays, varying)
    ]


def output(name: str, operands: Sequence[Any], shape: Sequence[int], dtype: Any) -> Any:
    """Abstract value of one output, varying over the manual mesh axes that the operands do."""
    varying = core.standard_vma_rule(name, *operands)
    return operands[0].update(
        shape=tuple(shape),
        dtype=dtype,
        weak_type=False,
        sharding=core.get_cur_mesh_sharding(),
        manual_axis_type=core.ManualAxisType(varying=varying),
    )


def struct(shape: Sequence[int], dtype: Any, operands: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """What a kernel returns, varying over the manual mesh axes that the operands do."""
    varying = frozenset().union(*(jax.typeof(x).mat.varying for x in operands))
    kind = core.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def zero_tangent(x: Any) -> ad.Zero:
    """The tangent of something that does not move."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def lower_with_devices(primitive: Primitive) -> None:
    """Lets the lowering rule of `primitive` know the devices, which custom partitioning needs."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def spec_of(sharding: Sharding | None, mesh: Mesh, ndim: int) -> PartitionSpec:
    """How an array of `ndim` axes is cut over the mesh.

    The compiler may cut axes over a part of a mesh axis, say 2 heads and then their width over 4
    devices, which no `PartitionSpec` says; such an array is called whole.
    """
    if sharding is None or isinstance(sharding, NamedSharding):
        return PartitionSpec() if sharding is None else sharding.spec
    try:
        return sharding_impls.parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(ndim), mesh)[
            0
        ]
    except ValueError:
        return PartitionSpec()

"""Metagradients on several devices: how to lay batches, windows and parameters over a mesh.

Nothing else changes: `metagradients` and `probe_scores` follow the shardings of what they are
given. Windows are independent until their gradients are added, so a batch is cut along B over every
device; with `fsdp > 1` parameters, moments, and with them tapes and the probe, are cut too and
gathered a layer at a time where XLA needs them.

    mesh = data_mesh(fsdp=4)
    params, opt_state = shard_params(mesh, params), shard_params(mesh, opt_state)
    result = metagradients(loss, outer, params, opt_state, shard_batches(mesh, batches), ...)

Several processes (hosts): call `jax.distributed.initialize(coordinator, count, index)` before
anything else of jax, then the same code in every process. `shard_batches` and `shard_windows` take
each process's own part, `shard_params` the whole tree in each; `phi`, `scores` and what
`probe_scores` returns are whole in every process.

Cost: a transfer to the devices. Reference: Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054, section 5 (cutting parameters and optimizer state).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.types import PyTree

AXES = ("data", "fsdp")


def data_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh with the axes `data` and `fsdp`.

    Args:
      devices: which to use, default all, those of other processes included.
      fsdp: over how many devices parameters are cut; the rest hold copies of them.

    Raises:
      ConfigError: the number of devices is not a multiple of `fsdp`.
    """
    devices = list(jax.devices() if devices is None else devices)
    if type(fsdp) is not int or fsdp < 1 or not devices or len(devices) % fsdp:
        raise ConfigError(
            f"fsdp={fsdp!r} with {len(devices)} devices; expected a positive integer that divides "
            "their number."
        )
    # Explicit axes, which jax.make_mesh defaults to, would need shardings in the model's own code.
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shard_batches(mesh: Mesh, batches: PyTree) -> PyTree:
    """Lays batches `(T, B, ...)` over the mesh, cut along B.

    Args:
      mesh: from `data_mesh`.
      batches: pytree of arrays; in several processes the part of each, B divided by their number.

    Raises:
      WindowError: an array has no axis B, or B is not a multiple of the number of devices.
    """
    return _cut_windows(mesh, batches, 1, "batches", "(T, B, ...)")


def shard_windows(mesh: Mesh, windows: PyTree) -> PyTree:
    """Lays windows `(N, ...)` over the mesh, cut along N.

    Args:
      mesh: from `data_mesh`.
      windows: pytree of arrays; in several processes the part of each, N divided by their number.

    Raises:
      WindowError: an array has no axis N, or N is not a multiple of the number of devices.
    """
    return _cut_windows(mesh, windows, 0, "windows", "(N, ...)")


def shard_params(mesh: Mesh, tree: PyTree) -> PyTree:
    """Lays parameters, or an optimizer state, over the mesh.

    Every leaf is cut over `fsdp` along its longest axis that can be cut evenly, and copied over
    `data`. Leaves without such an axis, and all of them if `fsdp` is 1, are copied everywhere. A
    moment has the shape of its parameter and so lies where that does.
    """
    return jax.tree.map(lambda x: _place(NamedSharding(mesh, spec_of(mesh, np.shape(x))), x), tree)


def spec_of(mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> PartitionSpec:
    """How `shard_params` cuts an array of this shape."""
    parts = mesh.shape["fsdp"]
    even = [i for i, size in enumerate(shape) if parts > 1 and size % parts == 0]
    if not even:
        return PartitionSpec()
    longest = max(even, key=lambda i: shape[i])
    return PartitionSpec(*[None] * longest, "fsdp")


def _place(sharding: NamedSharding, x: Any) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    # Every process holds the whole leaf and places its own parts: nothing has to be sent.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _cut_windows(mesh: Mesh, tree: PyTree, axis: int, name: str, expected: str) -> PyTree:
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))
    here = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)

    def cut(path: Any, x: Any) -> jax.Array:
        shape = np.shape(x)
        if len(shape) <= axis or shape[axis] == 0 or shape[axis] % here:
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise WindowError(
                f"{where} has the shape {shape} on {here} devices of this process; expected "
                f"{expected} with axis {axis} a positive multiple of {here}."
            )
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map_with_path(cut, tree)

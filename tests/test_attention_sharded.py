"""Attention over several devices: `shard_map`, and `jit` with sharded operands."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attention_cases import attend, documents, example, naive, quick_jit, transformations, worst
jax.config.update("jax_enable_x64", True)
devices = np.array(jax.devices()).reshape(2, 2)
mesh = Mesh(devices, ("data", "heads"))
ids = documents(4, 20)
x, along = (example((4, 20, 4, 4), key_heads=2, seed=s) for s in (0, 1))
NAME = "reverse over reverse"

def second(f):
    bound = lambda ids: functools.partial(f, segment_ids=ids)
    return lambda x, along, ids: transformations(bound(ids))[NAME](x, along)

expected = quick_jit(second(naive))(x, along, ids)
split = P("data", None, "heads")
for check in (True, False):
    mapped = jax.shard_map(
        second(attend("tiny")), mesh=mesh, in_specs=(split, split, P("data")), out_specs=split,
        check_vma=check,
    )
    error = worst(quick_jit(mapped)(x, along, ids), expected)
    assert error <= 1e-12, ("shard_map", check, error)

GATHERS = ("all-gather", "all-to-all", "collective-permute")
explicit = Mesh(devices, ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
for name, spec, mesh in (
    ("batch and heads", split, mesh),
    ("positions", P(None, "data"), mesh),
    ("typed", split, explicit),
):
    with jax.set_mesh(mesh):
        put = lambda y, spec: jax.device_put(y, NamedSharding(mesh, spec))
        placed = jax.tree.map(lambda y: put(y, spec), (x, along))
        first = put(ids, P(*spec[:1]))
        program = quick_jit(second(attend("tiny"))).lower(*placed, first).compile()
        found = program(*placed, first)
    error = worst(jax.device_get(found), jax.device_get(expected))
    assert error <= 1e-12, (name, error)
    for y in jax.tree.leaves(found):
        if name != "positions":
            assert y.sharding.is_equivalent_to(NamedSharding(mesh, split), 4), (name, y.sharding)
    text = program.as_text()
    moved = [g for g in GATHERS if f" {g}(" in text or f" {g}-start(" in text]
    assert not moved or name == "positions", (name, moved)

# Two heads whose width lies on four devices: the compiler cuts heads and width by half an axis.
mesh = Mesh(devices.reshape(4), ("fsdp",))
def fewer(y):
    heads = y.reshape(4, 20, 2, 8)
    return jnp.sum(jnp.sin(attend("tiny")(heads, heads, heads)))
flat = jnp.asarray(np.random.default_rng(0).normal(size=(4, 20, 16)))
expected = quick_jit(jax.grad(fewer))(flat)
found = quick_jit(jax.grad(fewer))(jax.device_put(flat, NamedSharding(mesh, P(None, None, "fsdp"))))
assert worst(jax.device_get(found), jax.device_get(expected)) <= 1e-12
"""


def test_batch_and_heads_stay_on_their_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""The programs for GPUs: interpreted against the specification, and lowered without a GPU."""

import contextlib
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    attend,
    documents,
    example,
    naive,
    quick_jit,
    transformations,
    worst,
)

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import attention, pallas, reference  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.implementations import IMPLEMENTATIONS, Implementation  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.parts import chosen  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.pattern import Pattern  # pyright: ignore[reportMissingImports]

# Tiles so small that short sequences take several, with padding in the last one.
LAUNCH = pallas.Launch(held=16, passed=16, warps=4, stages=2)
interpreted = functools.partial(pallas.run, launch=LAUNCH, interpret=True)
IMPLEMENTATIONS.setdefault("interpreted", Implementation(interpreted, interpreted, partial=True))

PROBLEMS = {
    "everything": ((2, 37, 4, 5), 37, 2, Pattern(0.6, 9, 0), True),
    "more keys": ((1, 20, 2, 4), 37, 1, Pattern(0.5), False),
    "queries that see nothing": ((1, 40, 1, 4), 7, 1, Pattern(0.5, 4, 4), False),
}


@pytest.mark.parametrize("name", ["reverse over reverse", "forward over reverse"])
def test_second_order_in_programs_is_that_of_the_whole_softmax(name):
    options = {"window": 9, "segment_ids": documents(1, 20)}
    with jax.enable_x64(True):
        x, along = (example((1, 20, 2, 4), key_heads=1, seed=s) for s in (0, 1))
        found, expected = (
            quick_jit(transformations(f)[name])(x, along)
            for f in (attend("interpreted", **options), functools.partial(naive, **options))
        )
        assert worst(found, expected) <= 1e-12


def operands_of(name, shape, keys, key_heads, pattern, ids, dtype: Any = np.float64):
    rng = np.random.default_rng(0)
    sizes = {
        "q": shape,
        "k": (shape[0], keys, key_heads, shape[3]),
        "r": (shape[0], shape[2], shape[1]),
    }
    operands = [jnp.asarray(rng.normal(size=sizes[kind]), dtype) for kind in OPERANDS[name][0]]
    if name != "fwd":
        operands[3] = reference.run("fwd", pattern, *operands[:3], *ids)[1]
    return operands


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", OPERANDS)
def test_every_primitive_computes_what_the_reference_computes(name, problem):
    shape, keys, key_heads, pattern, packed = PROBLEMS[problem]
    ids = [documents(*shape[:2])] if packed else []
    with jax.enable_x64(True):
        operands = operands_of(name, shape, keys, key_heads, pattern, ids)
        found = quick_jit(lambda *x: interpreted(name, pattern, *x, *ids))(*operands)
        for x, y in zip(found, reference.run(name, pattern, *operands, *ids), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bwd", "hess", "adj"])
def test_operands_that_are_zero_and_outputs_that_nobody_wants_are_left_out(name):
    pattern, kinds = Pattern(0.5, None, 0), OPERANDS[name][0]
    last = len(OPERANDS[name][1]) - 1
    with jax.enable_x64(True):
        operands = operands_of(name, (1, 20, 2, 4), 20, 2, pattern, [])
        absent = len(kinds) - 1
        some = [None if i == absent else x for i, x in enumerate(operands)]
        every = [0 * x if i == absent else x for i, x in enumerate(operands)]
        whole = reference.run(name, pattern, *every)
        for wanted in ([i == last for i in range(last + 1)], [i != last for i in range(last + 1)]):
            found = interpreted(name, pattern, *some, wanted=wanted)
            for x, y in zip(found, chosen(wanted, whole), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_operands_are_multiplied_as_they_are(dtype):
    name, pattern = "adj", Pattern(0.5, None, 0)
    wide = operands_of(name, (1, 40, 2, 16), 40, 2, pattern, [], np.float32)
    narrow = [x if x.ndim == 3 else x.astype(dtype) for x in wide]
    found = interpreted(name, pattern, *narrow)
    again = [x.astype(jnp.float32) for x in narrow]
    for x, y in zip(found, reference.run(name, pattern, *again), strict=True):
        assert str(x.dtype) == ("float32" if x.ndim == 3 else dtype)
        error = jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)
        assert error <= {"bfloat16": 1e-2, "float16": 2e-3}[dtype], error


# Lowering for a GPU takes none; jax 0.11 wants one described.


def lowered(function, *arguments):
    mesh = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):
        device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")  # pyright: ignore[reportAttributeAccessIssue]
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)  # pyright: ignore[reportCallIssue]
        mesh = jax.sharding.use_abstract_mesh(mesh)
    with mesh:
        program = jax.jit(function).trace(*arguments)
        return program.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_every_primitive_is_lowered_for_a_gpu(width, dtype):
    shape = (1, 300, 4, width)
    sizes = {"q": shape, "k": (1, 300, 2, width), "r": (1, 4, 300)}
    for name, (kinds, outputs) in OPERANDS.items():
        arrays = [jax.ShapeDtypeStruct(sizes[x], jnp.float32 if x == "r" else dtype) for x in kinds]
        text = lowered(functools.partial(pallas.run, name, Pattern(0.1, None, 0)), *arrays)
        sweeps = len({kind == "k" for kind in outputs})
        assert text.count("gpu.triton") == sweeps, name


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="jax 0.11 lowers for a described GPU primitives alone"
)
def test_derivatives_of_attention_are_programs_of_a_gpu():
    x, along = (example((1, 256, 4, 64), dtype=jnp.bfloat16, seed=s) for s in (0, 1))
    text = lowered(transformations(attend("pallas"))["reverse over reverse"], x, along)
    names = sorted(re.findall(r'name = "attention_(\w+)"', text))
    assert names == ["adj_columns", "adj_rows", "bwd_columns", "bwd_rows", "fwd_rows"]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 20, 2, 136), jnp.bfloat16, "q is bfloat16 with heads of 136; expected at most"),
        ((1, 20, 2, 8), np.float64, "q is float64 with heads of 8; expected at most float32"),
    ],
)
def test_what_the_programs_cannot_compute_is_refused(shape, dtype, message):
    with jax.enable_x64(True):
        x = example(shape, dtype=dtype)
        with pytest.raises(ConfigError, match=message):
            lowered(functools.partial(pallas.run, "fwd", Pattern(0.1)), *x)


def test_a_cpu_refuses_it_by_name():
    x = example((1, 20, 2, 8), dtype=np.float32)
    with pytest.raises(ConfigError, match="'pallas' cannot run: the computation is for a CPU"):
        attention(*x, implementation="pallas")

"""Cross-entropy in chunks: derivatives, memory, precision, sharding and refusals."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy.cross_entropy import token_cross_entropy

COUNT, WIDTH, VOCAB = 12, 4, 7


def example(count=COUNT, width=WIDTH, vocab=VOCAB, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden, embedding = rng.normal(size=(count, width)), rng.normal(size=(vocab, width))
    return (
        jnp.asarray(scale * hidden, jnp.float32),
        jnp.asarray(embedding, jnp.float32),
        jnp.asarray(rng.integers(0, vocab, count), jnp.int32),
    )


def plain(hidden, embedding, targets):
    logits = hidden @ embedding.T
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def transformations(losses):
    """Every composition that the metagradient engine and its tests use, of `losses(h, e)`."""

    def total(h, e):
        values = losses(h, e)
        return jnp.sum(values * jnp.linspace(0.5, 1.5, len(values), dtype=values.dtype))

    gradient = jax.grad(total, argnums=(0, 1))

    def along(h, e):
        return jnp.cos(h), jnp.sin(e)

    def slope(h, e):
        pairs = zip(gradient(h, e), jax.lax.stop_gradient(along(h, e)))
        return sum(jnp.vdot(x, y) for x, y in pairs)

    def push(f):
        return lambda h, e: jax.jvp(f, (h, e), along(h, e))[1]

    def several(h, e):
        stacked = [jnp.stack([x, 2 * x, x**2]) for x in along(h, e)]
        return jax.vmap(lambda *c: jax.jvp(gradient, (h, e), c)[1])(*stacked)

    def steps(h, e):
        def step(e, _):
            return e - 0.1 * jax.grad(total, argnums=1)(h, e), None

        return total(h, jax.lax.scan(jax.checkpoint(step), e, length=2)[0])

    return {
        "value": losses,
        "jvp": push(losses),
        "grad": gradient,
        "jvp of grad": push(gradient),
        "grad of grad": jax.grad(slope, argnums=(0, 1)),
        "grad of jvp": jax.grad(lambda h, e: jnp.sum(push(losses)(h, e)), argnums=(0, 1)),
        "jvp of jvp": push(push(losses)),
        "third": jax.grad(lambda h, e: jnp.sum(push(push(losses))(h, e)), argnums=(0, 1)),
        "vmap of jvp of grad": several,
        "checkpoint": push(jax.grad(jax.checkpoint(total), argnums=(0, 1))),
        "grad through training": jax.grad(steps, argnums=(0, 1)),
        "vmap over hidden": lambda h, e: jax.vmap(lambda x: losses(x, e))(jnp.stack([h, -h])),
        "vmap over embedding": lambda h, e: jax.vmap(lambda x: gradient(h, x))(jnp.stack([e, -e])),
    }


NAMES = sorted(transformations(lambda h, e: h[:, 0]))


@functools.cache
def program(name, chunk, width=None):
    def run(hidden, embedding, targets):
        losses = functools.partial(plain, targets=targets)
        if chunk is not None:
            losses = functools.partial(token_cross_entropy, targets=targets, chunk=chunk)
        return transformations(losses)[name](hidden, embedding)

    del width  # a cache key: the same function in another precision is another program
    return jax.jit(run)


def assert_close(found, expected, tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1, np.abs(y).max()))


IN_ONE_PIECE = ["grad of grad", "jvp of grad", "vmap of jvp of grad"]
CASES = [(name, 5) for name in NAMES] + [(name, COUNT) for name in IN_ONE_PIECE]


@pytest.mark.parametrize(("name", "chunk"), CASES)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 3.0))
def test_chunks_change_no_derivative(name, chunk, seed, scale):
    hidden, embedding, targets = example(seed=seed, scale=scale)
    found = program(name, chunk)(hidden, embedding, targets)
    with jax.enable_x64(True):
        wide = (np.asarray(x, np.float64) for x in (hidden, embedding))
        expected = jax.device_get(program(name, None, 64)(*wide, targets))
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 12, 13, None])
def test_every_chunk_length_gives_every_position_its_own_loss(chunk):
    hidden, embedding, targets = example()
    found = token_cross_entropy(hidden, embedding, targets, chunk=chunk)
    np.testing.assert_allclose(found, plain(hidden, embedding, targets), rtol=1e-5, atol=1e-6)


def test_float64_is_kept():
    with jax.enable_x64(True):
        hidden, embedding, targets = (np.asarray(x) for x in example(seed=3))
        arguments = (hidden.astype(np.float64), embedding.astype(np.float64), targets)
        found, expected = (program("jvp of grad", c, "64")(*arguments) for c in (5, None))
        assert {x.dtype for x in found} == {np.dtype("float64")}
        assert_close(found, expected, 1e-12)


def test_logits_far_from_zero_stay_finite():
    hidden, embedding, targets = example()
    for scale in (1e4, -1e4):
        arguments = (scale * hidden, embedding, targets)
        for name in ("value", "grad", "jvp of grad"):
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(program(name, 5)(*arguments)))


@pytest.mark.parametrize("chunk", [5, COUNT])
def test_low_precision_is_reduced_in_float32(chunk):
    # Products of bfloat16 numbers are exact in float32: only the sum may differ.
    hidden, embedding, targets = example(width=64)
    low = hidden.astype(jnp.bfloat16), embedding.astype(jnp.bfloat16)
    found = token_cross_entropy(low[0], low[1], targets, chunk=chunk)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found,
        plain(low[0].astype(jnp.float32), low[1].astype(jnp.float32), targets),
        rtol=1e-5,
        atol=1e-5,
    )
    gradient = program("jvp of grad", chunk, "low")(*low, targets)
    assert {x.dtype for x in gradient} == {jnp.dtype("bfloat16")}
    expected = program("jvp of grad", None)(hidden, embedding, targets)
    for x, y in zip(gradient, expected):
        assert np.linalg.norm(x.astype(jnp.float32) - y) < 0.03 * np.linalg.norm(y)


def test_inputs_of_two_precisions_meet_in_the_wider():
    hidden, embedding, targets = example()
    mixed = token_cross_entropy(hidden.astype(jnp.bfloat16), embedding, targets, chunk=5)
    rounded = hidden.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(mixed, plain(rounded, embedding, targets), rtol=1e-5, atol=1e-5)


# Memory: what exists at once, in the trace and in the compiled program.

LONG = {"count": 96, "width": 3, "vocab": 50}


def equations(jaxpr):
    """Every equation of a jaxpr and of all jaxprs inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for x in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(getattr(x, "jaxpr", x), "eqns"):
                yield from equations(x)


def largest(jaxpr):
    """Elements of the largest array that a jaxpr makes."""
    return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars)


SECOND_ORDER = ["value", "jvp", "grad", "jvp of grad", "grad of grad", "grad of jvp", "jvp of jvp"]


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_what_one_chunk_keeps_for_a_derivative_has_no_vocabulary_axis(name):
    arguments = example(**LONG)
    # The largest array between two passes is (N, D) or (V, D).
    assert largest(jax.make_jaxpr(program(name, 8))(*arguments)) <= 96 * 3
    assert largest(jax.make_jaxpr(program(name, None))(*arguments)) >= 96 * 50


def test_compiled_memory_follows_the_chunk_and_not_the_batch():
    arguments = example(count=4096, width=4, vocab=512)
    logits = 4096 * 512 * 4

    def temporary(name, chunk):
        compiled = program(name, chunk).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    for name in ("grad", "jvp of grad", "grad of grad"):
        assert temporary(name, 64) < logits / 4 < logits <= temporary(name, None)


@pytest.mark.parametrize("chunk", [8, 96])
@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("value", {"loss": 1}),
        ("jvp", {"loss": 1, "slope": 1}),
        ("grad", {"loss": 1, "pull": 1}),
        ("jvp of grad", {"loss": 1, "slope": 1, "pull": 1, "hessian": 1}),
        ("vmap of jvp of grad", {"loss": 1, "slope": 1, "pull": 1, "hessian": 1}),
    ],
)
def test_each_pass_is_made_once_for_all_tangents(name, passes, chunk):
    traced = jax.make_jaxpr(program(name, chunk))(*example(**LONG))
    names = [e.primitive.name.removeprefix("cross_entropy_") for e in equations(traced)]
    found = {x: names.count(x) for x in ("loss", "slope", "pull", "hessian", "twice")}
    assert {x: n for x, n in found.items() if n} == passes
    assert ("scan" in names) == (chunk < 96)


# Several devices: the batch axis stays where it is.

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from metagrad_filter.proxy.cross_entropy import token_cross_entropy
mesh = Mesh(np.array(jax.devices()), ("data",))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
rng = np.random.default_rng(0)
h, e = rng.normal(size=(64, 8)).astype("f"), rng.normal(size=(32, 8)).astype("f")
t = rng.integers(0, 32, 64).astype("i")
def evaluation(h, e, t):
    total = lambda h, e: token_cross_entropy(h, e, t, chunk=16).mean()
    return jax.jvp(jax.grad(total, (0, 1)), (h, e), (jnp.cos(h), jnp.sin(e)))[1]
expected = jax.jit(evaluation)(h, e, t)
placed = jax.device_put(h, rows), jax.device_put(e, whole), jax.device_put(t, rows)
program = jax.jit(evaluation, out_shardings=(rows, whole)).lower(*placed).compile()
for x, y in zip(program(*placed), expected):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
text = program.as_text()
for operation in ("all-gather", "all-to-all", "collective-permute"):
    assert f" {operation}(" not in text and f" {operation}-start(" not in text, operation
assert "all-reduce" in text
"""


def test_a_batch_sharded_over_devices_is_never_gathered():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": jnp.ones((2, 6, 4))}, r"hidden \(2, 6, 4\).*flatten windows"),
        ({"hidden": jnp.ones((12, 5))}, r"hidden \(12, 5\), embedding \(7, 4\)"),
        ({"targets": jnp.zeros(11, jnp.int32)}, r"targets \(11,\) do not fit"),
        ({"targets": jnp.zeros((12, 1), jnp.int32)}, r"targets \(12, 1\) do not fit"),
        ({"embedding": jnp.ones((0, 4))}, r"embedding \(0, 4\)"),
        ({"embedding": jnp.ones(4)}, r"embedding \(4,\)"),
        ({"targets": jnp.zeros(12)}, "targets have dtype float32"),
        ({"hidden": jnp.ones((12, 4), jnp.int32)}, "hidden has dtype int32"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": True}, "chunk=True"),
        ({"chunk": 2.5}, "chunk=2.5"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    names = ("hidden", "embedding", "targets")
    arguments = dict(zip(names, example())) | changes
    with pytest.raises(ConfigError, match=message):
        token_cross_entropy(**arguments)

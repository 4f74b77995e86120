"""Activations against jax.nn at every order, and what their derivatives compute."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagrad_filter.proxy.activations import ACTIVATIONS

REFERENCE = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
TRANSCENDENTAL = {"gelu_new": ["exp"], "gelu": ["erfc", "exp"], "silu": ["exp"], "relu2": []}
NAMES = sorted(ACTIVATIONS)
SIZE = 64


@functools.cache
def tower(name, reference, order):
    """The derivative of an order, elementwise, forward mode all the way."""
    f = (REFERENCE if reference else ACTIVATIONS)[name]
    for _ in range(order):
        f = functools.partial(lambda g, x: jax.jvp(g, (x,), (jnp.ones_like(x),))[1], f)
    return jax.jit(f)


def along(x):
    return jnp.cos(jnp.arange(SIZE, dtype=x.dtype))


@functools.cache
def transformed(name, reference, mode):
    f = (REFERENCE if reference else ACTIVATIONS)[name]

    def total(x):
        return jnp.sum(jnp.sin(f(x)) * along(x))

    def tangent(g, x, c=None):
        return jax.jvp(g, (x,), (along(x) if c is None else c,))[1]

    def looped(x, step=lambda f: f):
        return jnp.sum(jax.lax.scan(step(lambda c, _: (f(c) + x, None)), x, length=2)[0])

    gradient = jax.grad(total)
    modes = {
        "grad": gradient,
        "forward over reverse": lambda x: tangent(gradient, x),
        "reverse over reverse": jax.grad(lambda x: gradient(x) @ along(x)),
        "reverse over forward": jax.grad(lambda x: tangent(total, x)),
        "third": jax.grad(lambda x: tangent(gradient, x) @ along(x)),
        "checkpoint": lambda x: tangent(jax.grad(jax.checkpoint(total)), x),
        "vmap of tangents": lambda x: jax.vmap(lambda c: tangent(gradient, x, c))(
            jnp.stack([along(x), along(x) ** 2])
        ),
        "scan": jax.grad(looped),
        # Where a loop is split for its derivative, jax forgets custom rules.
        "forward over reverse of a scan": lambda x: tangent(jax.grad(looped), x),
        "reverse over reverse of a scan": jax.grad(lambda x: jax.grad(looped)(x) @ along(x)),
        "third of a scan": jax.grad(lambda x: tangent(jax.grad(looped), x) @ along(x)),
        "checkpoint in a scan": lambda x: tangent(
            jax.grad(functools.partial(looped, step=jax.checkpoint)), x
        ),
    }
    return jax.jit(modes[mode])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 8.0))
def test_values_and_three_derivatives_are_exact_to_1e_6(name, order, seed, scale):
    x = np.random.default_rng(seed).normal(scale=scale, size=SIZE).astype(np.float32)
    x[:4] = 0.0, -0.0, 30.0, -30.0
    found = tower(name, False, order)(x)
    assert found.dtype == jnp.float32
    # In float64: jax's own float32 derivatives are off by 1e-5 where 1 - tanh^2 cancels.
    with jax.enable_x64(True):
        exact = np.asarray(tower(name, True, order)(x.astype(np.float64)))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "mode",
    [
        "grad",
        "forward over reverse",
        "reverse over reverse",
        "reverse over forward",
        "third",
        "checkpoint",
        "vmap of tangents",
        "scan",
        "forward over reverse of a scan",
        "reverse over reverse of a scan",
        "third of a scan",
        "checkpoint in a scan",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_transformation_gives_what_jax_gives(name, mode):
    x = np.linspace(-4, 4, SIZE, dtype=np.float32)
    found = transformed(name, False, mode)(x)
    with jax.enable_x64(True):
        exact = np.asarray(transformed(name, True, mode)(x.astype(np.float64)))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_of_the_input_is_kept(name):
    x = jnp.linspace(-3, 3, SIZE)
    found = ACTIVATIONS[name](x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), REFERENCE[name](x), rtol=0.02, atol=0.02)
    with jax.enable_x64(True):
        wide = jnp.linspace(-3, 3, SIZE, dtype=jnp.float64)
        assert ACTIVATIONS[name](wide).dtype == jnp.float64
        np.testing.assert_allclose(ACTIVATIONS[name](wide), REFERENCE[name](wide), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_tangent_of_a_gradient_computes_each_transcendental_once(name):
    text = jax.make_jaxpr(
        lambda x: jax.jvp(jax.grad(lambda x: jnp.sum(ACTIVATIONS[name](x))), (x,), (x,))
    )(jnp.ones(SIZE))
    for operation in ("tanh", "erfc", "erf", "exp", "logistic"):
        count = len(re.findall(rf"= {operation}\b", str(text)))
        assert count == TRANSCENDENTAL[name].count(operation), operation


def test_the_table_names_its_functions():
    assert NAMES == ["gelu", "gelu_new", "relu2", "silu"]

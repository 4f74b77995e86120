"""Moving live moments into the inner optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.optimizer import apply_update, warm_state

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
GRADIENT = jax.tree.map(lambda p: p + 0.5, PARAMS)

FACTORIES = {
    "adamw": lambda rate: optax.adamw(rate, b2=0.95),
    "scale_by_adam": lambda rate: optax.scale_by_adam(),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(rate)),
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "injected": lambda rate: optax.inject_hyperparams(optax.adamw)(learning_rate=rate),
    "masked": lambda rate: optax.masked(optax.adamw(rate), {"w": True, "b": False}),
}


def after(optimizer, steps):
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        params, state = apply_update(optimizer, params, state, GRADIENT)
    return params, state


@pytest.mark.parametrize("name", FACTORIES)
def test_a_warm_state_steps_as_the_live_one_does_at_the_inner_rate(name):
    live, inner = FACTORIES[name](1e-3), FACTORIES[name](1e-4)
    params, state = after(live, 7)
    expected, _ = apply_update(live, params, state, GRADIENT)
    found, _ = apply_update(inner, params, warm_state(inner, params, state), GRADIENT)
    scale = 1.0 if name == "scale_by_adam" else 0.1
    for path, leaf in jax.tree.leaves_with_path(found):
        start = dict(jax.tree.leaves_with_path(params))[path]
        live_step = dict(jax.tree.leaves_with_path(expected))[path] - start
        step = np.asarray(leaf - start)
        if name == "masked" and path[-1].key == "b":
            np.testing.assert_allclose(step, live_step, rtol=1e-3)
        else:
            np.testing.assert_allclose(step, scale * live_step, rtol=2e-2, atol=1e-9)


def test_a_schedule_starts_anew():
    steps = 10
    live = optax.adamw(optax.linear_schedule(1.0, 0.0, steps))
    params, state = after(live, steps)
    inner = optax.adamw(optax.linear_schedule(1.0, 0.0, steps))
    moved, _ = apply_update(inner, params, warm_state(inner, params, state), GRADIENT)
    assert float(jnp.abs(moved["w"] - params["w"]).min()) > 0.5


def test_a_state_without_any_fitting_moment_is_refused():
    with pytest.raises(ConfigError, match="no moment"):
        warm_state(optax.adamw(1e-3), PARAMS, optax.sgd(1e-3).init(PARAMS))

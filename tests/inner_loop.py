"""A small inner loop for tests: a model, data, warm moments, and its metagradients by autodiff.

The reference is a plain `lax.scan` over optax, differentiated by jax as a whole. Besides the
weights it differentiates a perturbation added to each step's gradient; the derivative by that
perturbation is the cotangent whose mean is the probe.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH, HIDDEN, BATCH = 4, 5, 6

WARM_STEPS = 6


def mlp_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["kernel"])
    return (hidden @ params["output"] - batch["y"]) ** 2


def mlp_outer(params):
    x = jnp.linspace(-1.0, 1.0, 3 * WIDTH, dtype=params["kernel"].dtype).reshape(3, WIDTH)
    return jnp.mean(mlp_loss(params, {"x": x, "y": jnp.cos(x.sum(axis=1))}))


def other_outer(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def mlp_params():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (WIDTH, HIDDEN), "output": (HIDDEN,)}
    return {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}


def mlp_batches(steps, size=BATCH, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(steps, size, WIDTH))
    y = np.sin(x[..., 0]) + rng.normal(size=(steps, size)) / 5
    return {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def uneven_weights(steps, size=BATCH):
    weights = np.random.default_rng(2).uniform(0.2, 2.0, (steps, size))
    weights[0, 0] = 0.0
    return jnp.asarray(weights)


@functools.partial(jax.jit, static_argnames=("loss", "outer", "optimizer"))
def train(params, state, batches, weights, nudges, *, loss, outer, optimizer):
    """Phi after training; `nudges` is added to the gradient of each step."""

    def step(carry, inputs):
        params, state = carry
        batch, w, nudge = inputs
        gradient = jax.grad(lambda p: jnp.sum(w * loss(p, batch)) / w.shape[0])(params)
        gradient = jax.tree.map(jnp.add, gradient, nudge)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (end, state), _ = jax.lax.scan(step, (params, state), (batches, weights, nudges))
    return outer(end), (end, state)


_differentiate = jax.jit(
    jax.value_and_grad(train, argnums=(3, 4), has_aux=True),
    static_argnames=("loss", "outer", "optimizer"),
)


def reference(loss, outer, params, state, batches, *, optimizer, weights=None):
    """`(phi, scores, probe)` by autodiff through the whole loop."""
    steps, size = jax.tree.leaves(batches)[0].shape[:2]
    weights = jnp.ones((steps, size)) if weights is None else weights
    nudges = jax.tree.map(lambda p: jnp.zeros((steps, *p.shape), p.dtype), params)
    (phi, _), (slopes, cotangents) = _differentiate(
        params, state, batches, weights, nudges, loss=loss, outer=outer, optimizer=optimizer
    )
    probe = jax.tree.map(lambda c: np.asarray(c).mean(axis=0) / size, cotangents)
    return float(phi), -np.asarray(slopes), probe


def warmed(optimizer, params, loss=mlp_loss, batches=None):
    """Parameters and moments after a few steps."""
    batches = mlp_batches(WARM_STEPS, seed=9) if batches is None else batches
    steps, size = jax.tree.leaves(batches)[0].shape[:2]
    nudges = jax.tree.map(lambda p: jnp.zeros((steps, *p.shape), p.dtype), params)
    _, (params, state) = train(
        params,
        optimizer.init(params),
        batches,
        jnp.ones((steps, size)),
        nudges,
        loss=loss,
        outer=other_outer,
        optimizer=optimizer,
    )
    return params, state


def start(optimizer, moments) -> tuple[Any, Any]:
    params = mlp_params()
    return warmed(optimizer, params) if moments == "warm" else (params, optimizer.init(params))


def relative_error(found, expected):
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)]).astype(np.float64)
    expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)]).astype(np.float64)
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)

"""A latent predictor of time series (JEPA): states are predicted from states, values never.

    JepaLoss(JepaConfig(encoder), anchors)(params, windows) -> (B,)

A causal encoder reads the patches up to p, a small predictor guesses the state of patch p + 1 that
a *target encoder* gives, and the target encoder follows the encoder as an exponential moving
average. Three things are decided so that metagradients stay exact:

* The target encoder is part of the parameters, and `EmaOptimizer` moves it: it passes everything
  else to an inner optimizer, discards the gradient of the target encoder, and takes the average.
  That is where the "stop-gradient" is. In the loss there is none: the loss stays a plain function,
  its Hessian symmetric, and since the optimizer never reads the target encoder's gradient, training
  is what it would be. With `stop_gradient` in the loss a metagradient would miss what the moving
  target does to later steps.
* Collapse is prevented by variance and covariance terms on *anchors*, a fixed sample of windows
  that belongs to the loss. Taken over the batch they would couple the windows' losses, and the
  weight of a window would have no derivative of its own. They are the same for all windows, so
  they move every score alike.
* The loss of a window is the mean over its positions, of positions with an observed value to come.

Cost: two encoders, and one pass over the anchors an evaluation.

References:
  Assran et al., 2023, https://arxiv.org/abs/2301.08243 (I-JEPA);
  Bardes et al., 2022, https://arxiv.org/abs/2105.04906, section 4.1 (variance and covariance).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.proxy import layers
from metagrad_filter.proxy.activations import ACTIVATIONS
from metagrad_filter.proxy.forecast import Array
from metagrad_filter.proxy.series import PatchEncoder, SeriesConfig, in_patches
from metagrad_filter.types import PyTree

TARGET = "target"
_LEAST_VARIANCE = 1e-4


@dataclass(frozen=True)
class JepaConfig:
    """Shape of a latent predictor.

    Attributes:
      encoder: of both encoders; its head is not used.
      hidden: width of the predictor's hidden layer.
      variance: weight of the term that keeps each state's standard deviation at 1 or above.
      covariance: weight of the term that keeps states uncorrelated.

    Raises:
      ConfigError: a field is out of its domain.
    """

    encoder: SeriesConfig
    hidden: int = 64
    variance: float = 1.0
    covariance: float = 0.04

    def __post_init__(self):
        layers.check_sizes(self, "hidden")
        for name in ("variance", "covariance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)!r}; expected a number >= 0.")


class Predictor(nnx.Module):
    """State after patch p -> state of the target encoder after patch p + 1."""

    def __init__(self, config: JepaConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.encoder.initializer_range)
        linear = functools.partial(nnx.Linear, kernel_init=normal, rngs=rngs)
        self.c_fc = linear(config.encoder.width, config.hidden)
        self.c_proj = linear(config.hidden, config.encoder.width)
        self.activation = config.encoder.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


def init_jepa(config: JepaConfig, *, seed: int = 0) -> PyTree:
    """Fresh parameters: "encoder", "predictor", and "target", which starts as the encoder.

    Args:
      config: the shape.
      seed: decides every parameter.
    """
    encoder = _params_of(PatchEncoder(config.encoder, rngs=nnx.Rngs(seed)))
    predictor = _params_of(Predictor(config, rngs=nnx.Rngs(seed + 1)))
    # A copy: a program that is given one buffer twice may not write over either.
    return {"encoder": encoder, "predictor": predictor, TARGET: jax.tree.map(jnp.array, encoder)}


@dataclass(frozen=True, eq=False)
class JepaLoss:
    """`loss(params, windows) -> (B,)`: squared error of predicted states, and the anchors' terms.

    Train it with an `EmaOptimizer`; another optimizer would train the target encoder too. Equal
    configurations with equal anchors are equal, and share compiled programs.

    Attributes:
      config: shape of the predictor.
      anchors: `(A, T, C)` float32 windows on which variance and covariance are measured; 32 to 128.

    Raises:
      WindowError: fewer than two anchors.
    """

    config: JepaConfig
    anchors: np.ndarray

    def __post_init__(self):
        if np.ndim(self.anchors) != 3 or len(self.anchors) < 2:
            raise WindowError(
                f"anchors have shape {np.shape(self.anchors)}; expected (A, T, C) with A >= 2."
            )

    @property
    def kind(self) -> str:
        """The kind of windows that this loss reads."""
        return "series"

    @functools.cached_property
    def _key(self) -> tuple[JepaConfig, str]:
        digest = hashlib.sha256(np.ascontiguousarray(self.anchors).tobytes()).hexdigest()
        return self.config, f"{self.anchors.shape} {digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JepaLoss) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, params: PyTree, windows: Array) -> jax.Array:
        return self.prediction_errors(params, windows) + self.collapse(params)

    def prediction_errors(self, params: PyTree, windows: Array) -> jax.Array:
        """`(B,)` mean squared error of the predicted states, without the anchors' terms."""
        graph = _abstract(self.config)[1]
        predicted = nnx.merge(graph, params["predictor"])(self.hidden(params, windows)[:, :-1])
        sought = self._encoded(params[TARGET], windows)[:, 1:]
        patches = in_patches(self.config.encoder, windows)
        seen = jnp.isfinite(patches).any(axis=(2, 3))[:, 1:]
        errors = jnp.where(seen, jnp.mean(jnp.square(predicted - sought), axis=-1), 0)
        return jnp.sum(errors, axis=1) / jnp.maximum(jnp.sum(seen, axis=1), 1)

    def collapse(self, params: PyTree) -> jax.Array:
        """The variance and covariance terms of the encoder on the anchors, a scalar."""
        states = self.hidden(params, jnp.asarray(self.anchors))
        states = states.reshape(-1, states.shape[-1])
        x = states - states.mean(axis=0)
        covariance = x.T @ x / (len(x) - 1)
        deviations = jnp.sqrt(jnp.diagonal(covariance) + _LEAST_VARIANCE)
        flat = jnp.mean(jax.nn.relu(1 - deviations))
        off = covariance - jnp.diag(jnp.diagonal(covariance))
        correlated = jnp.sum(jnp.square(off)) / len(off)
        return self.config.variance * flat + self.config.covariance * correlated

    def hidden(self, params: PyTree, windows: Array) -> jax.Array:
        """`(B, P, D)` states of the encoder after the last norm."""
        return self._encoded(params["encoder"], windows)

    def _encoded(self, encoder: PyTree, windows: Array) -> jax.Array:
        model = nnx.merge(_abstract(self.config)[0], encoder)
        return model(in_patches(self.config.encoder, windows))


@dataclass(frozen=True)
class EmaOptimizer:
    """Learning rate -> an optimizer that moves "target" as an average of "encoder".

    After each step of the inner optimizer `target <- decay * target + (1 - decay) * encoder`.
    The inner optimizer sees neither the target encoder nor its gradient.

    Attributes:
      inner: learning rate -> optax transformation, for instance `functools.partial(optax.adamw,
        b2=0.95)`.
      decay: in [0, 1).

    Raises:
      ConfigError: a field is out of its domain.
    """

    inner: Callable[[Any], optax.GradientTransformation]
    decay: float = 0.98

    def __post_init__(self):
        if not callable(self.inner):
            raise ConfigError(f"inner={self.inner!r}; expected an optimizer factory.")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay={self.decay!r}; expected a number in [0, 1).")

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        inner, share = self.inner(learning_rate), 1 - self.decay

        def init(params: PyTree) -> Any:
            return inner.init(_trained(params))

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            if params is None:
                raise ConfigError("an EmaOptimizer needs params; call update(g, state, params).")
            trained = _trained(params)
            moves: Any
            moves, state = inner.update(_trained(updates), state, trained)
            moved = optax.apply_updates(trained["encoder"], moves["encoder"])
            follow = jax.tree.map(lambda new, old: share * (new - old), moved, params[TARGET])
            return {**moves, TARGET: follow}, state

        return optax.GradientTransformation(init, update)


def _trained(params: PyTree) -> dict[str, PyTree]:
    return {name: part for name, part in params.items() if name != TARGET}


def _params_of(module: nnx.Module) -> PyTree:
    return nnx.to_pure_dict(nnx.split(module, nnx.Param)[1])


@functools.lru_cache(maxsize=32)
def _abstract(config: JepaConfig) -> tuple[Any, Any]:
    """Encoder and predictor without their parameters."""
    modules = nnx.eval_shape(
        lambda: (
            PatchEncoder(config.encoder, rngs=nnx.Rngs(0)),
            Predictor(config, rngs=nnx.Rngs(0)),
        )
    )
    return nnx.split(modules[0], nnx.Param)[0], nnx.split(modules[1], nnx.Param)[0]

"""A patch transformer for time series: causal next-patch prediction in flax.nnx.

    SeriesLoss(SeriesConfig(channels=4, patch=4, max_patches=16))(params, windows) -> (B,)

Windows are `(B, T, C)` float32 of scaled values, NaN (and inf) meaning missing. A window is cut
into patches of consecutive steps; each is embedded with the mask of what was observed, passes the
blocks of `proxy/decoder.py` (causal attention included), and the state after patch p predicts the
values of patch p + 1 relative to the last observed value of each channel. What is missing is
neither read nor predicted. Every function is jit-, jvp- and grad-transformable in any order.

Cost: that of a decoder of `T / patch` tokens; the head is `patch * C * outputs` wide.

References:
  Nie et al., 2023, https://arxiv.org/abs/2211.14730 (patches as tokens);
  Das et al., 2024, https://arxiv.org/abs/2310.10688 (decoder-only next-patch prediction).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy import layers
from metagrad_filter.proxy.activations import ACTIVATIONS
from metagrad_filter.proxy.decoder import Block, DecoderConfig
from metagrad_filter.proxy.forecast import Array, Head, Quantiles, StudentT
from metagrad_filter.types import PyTree

_LIMIT = 1e6  # scaled values beyond it are cut: their squares must stay within float32


@dataclass(frozen=True)
class SeriesConfig:
    """Shape of a patch transformer.

    Attributes:
      channels: C.
      patch: steps of a patch; the model predicts that many at once.
      max_patches: longest window, in patches.
      width: of the residual stream.
      layers: number of blocks.
      heads: attention heads; divides width.
      activation: a name of `activations.ACTIVATIONS`; squared ReLU has cheap second derivatives.
      initializer_range: standard deviation of the initial kernels.
      head: what is predicted for each value: `StudentT` or `Quantiles`.

    Raises:
      ConfigError: a field is out of its domain.
    """

    channels: int
    patch: int = 4
    max_patches: int = 64
    width: int = 64
    layers: int = 2
    heads: int = 4
    activation: str = "relu2"
    initializer_range: float = 0.06
    head: Head = field(default_factory=StudentT)

    def __post_init__(self):
        layers.check_sizes(self, "channels", "patch", "max_patches", "width", "layers", "heads")
        if self.width % self.heads:
            raise ConfigError(
                f"width={self.width} is not a multiple of heads={self.heads}; change either."
            )
        layers.check_choice(self, "activation", ACTIVATIONS)
        layers.check_positive(self, "initializer_range")
        if not isinstance(self.head, StudentT | Quantiles):
            raise ConfigError(f"head={self.head!r}; expected a StudentT or Quantiles.")

    @property
    def blocks(self) -> DecoderConfig:
        """The blocks of this transformer, as those of a decoder without tokens."""
        return DecoderConfig(
            vocab_size=1,
            n_positions=self.max_patches,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            activation_function=self.activation,
            initializer_range=self.initializer_range,
        )


class PatchEncoder(nnx.Module):
    """Patches `(B, P, patch, C)`, NaN missing -> hidden states after the last norm, `(B, P, D)`."""

    def __init__(self, config: SeriesConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        inputs = 2 * config.patch * config.channels
        self.embed = nnx.Linear(inputs, config.width, kernel_init=normal, rngs=rngs)
        self.positions = nnx.Embed(
            config.max_patches, config.width, embedding_init=normal, rngs=rngs
        )
        self.h = nnx.List([Block(config.blocks, rngs=rngs) for _ in range(config.layers)])
        self.ln_f = nnx.LayerNorm(config.width, rngs=rngs)

    def __call__(self, patches: Array) -> jax.Array:
        observed = jnp.isfinite(patches)
        # A spike of a thousand deviations must not drown the rest of its patch.
        values = jnp.arcsinh(jnp.where(observed, patches, 0))
        both = jnp.concatenate([values, observed.astype(values.dtype)], axis=-1)
        x = self.embed(both.reshape(*both.shape[:2], -1))
        x = x + self.positions.embedding[...][jnp.arange(x.shape[1])]
        return self.ln_f(layers.walk(self.h, x, remat=False))


class PatchDecoder(nnx.Module):
    """A patch encoder with the linear layer of a forecast."""

    def __init__(self, config: SeriesConfig, *, rngs: nnx.Rngs):
        self.encoder = PatchEncoder(config, rngs=rngs)
        outputs = config.patch * config.channels * config.head.outputs
        normal = nnx.initializers.normal(config.initializer_range)
        self.head = nnx.Linear(config.width, outputs, kernel_init=normal, rngs=rngs)

    def __call__(self, patches: Array) -> tuple[jax.Array, jax.Array]:
        hidden = self.encoder(patches)
        return hidden, self.head(hidden)


def init_series(config: SeriesConfig, *, seed: int = 0) -> PyTree:
    """Fresh parameters of the patch transformer: nested dict of float32 arrays.

    Args:
      config: its shape.
      seed: decides every parameter.
    """
    _, params = nnx.split(PatchDecoder(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return nnx.to_pure_dict(params)


@dataclass(frozen=True)
class SeriesLoss:
    """`loss(params, windows) -> (B,)`: mean loss over the observed values that are predicted.

    Nats a value under a `StudentT` head, twice the mean pinball loss under `Quantiles`. The first
    patch is context only. A window without an observed value after it has loss 0 and teaches
    nothing. A frozen value object, so that equal configurations share compiled programs and a
    worker process can be sent one.

    Attributes:
      config: shape of the transformer.
    """

    config: SeriesConfig

    @property
    def kind(self) -> str:
        """The kind of windows that this loss reads; calibration fits a scorer of that kind."""
        return "series"

    @property
    def unit(self) -> float:
        """What a share of this loss is a share of at least: nats of a density cross zero."""
        return 1.0 if isinstance(self.config.head, StudentT) else 0.0

    def __call__(self, params: PyTree, windows: Array) -> jax.Array:
        losses, predicted = self.step_losses(params, windows)
        count = jnp.sum(predicted, axis=(1, 2))
        return jnp.sum(losses, axis=(1, 2)) / jnp.maximum(count, 1)

    def step_losses(self, params: PyTree, windows: Array) -> tuple[jax.Array, jax.Array]:
        """Loss of each value, 0 where none is predicted, and where one is: both `(B, T, C)`.

        Raises:
          ConfigError: the windows do not fit this transformer.
        """
        raw, base, predicted = self._forecast(params, windows)
        values = jnp.where(predicted, windows, 0)
        values = jnp.clip(values, -_LIMIT, _LIMIT).astype(raw.dtype)
        losses = self.config.head.losses(raw, base, values)
        return jnp.where(predicted, losses, 0), predicted

    def intervals(
        self, params: PyTree, windows: Array, level: float
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Lower and upper bounds of each value's central interval, and where a value is predicted.

        Args:
          params: of the transformer.
          windows: `(B, T, C)`.
          level: probability that the interval holds, in (0, 1).
        """
        raw, base, predicted = self._forecast(params, windows)
        lower, upper = self.config.head.interval(raw, base, level)
        return lower, upper, predicted

    def points(self, params: PyTree, windows: Array) -> tuple[jax.Array, jax.Array]:
        """Median forecast of each value, and where one is predicted: both `(B, T, C)`."""
        raw, base, predicted = self._forecast(params, windows)
        return self.config.head.point(raw, base), predicted

    def hidden(self, params: PyTree, windows: Array) -> jax.Array:
        """`(B, P, D)` hidden states after the last norm; the last one has seen all patches."""
        return self._apply(params, windows)[0]

    def _apply(self, params: PyTree, windows: Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(_abstract(self.config), params)
        return model(in_patches(self.config, windows))

    def _forecast(self, params: PyTree, windows: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Raw outputs `(B, T, C, K)`, last observed values and where values are predicted."""
        config = self.config
        raw = self._apply(params, windows)[1]
        count, patches = raw.shape[:2]
        raw = raw.reshape(count, patches, config.patch, config.channels, -1)
        # The state after patch p predicts patch p + 1; nothing predicts the first one.
        raw = jnp.concatenate([jnp.zeros_like(raw[:, :1]), raw[:, :-1]], axis=1)
        raw = raw.reshape(*windows.shape, -1)
        later = jnp.arange(windows.shape[1]) >= config.patch
        predicted = jnp.isfinite(windows) & later[:, None]
        return raw, last_observed(windows, config.patch).astype(raw.dtype), predicted


def in_patches(config: SeriesConfig, windows: Array) -> Array:
    """`(B, T, C)` windows as `(B, P, patch, C)`; raises `ConfigError` where they do not fit."""
    _, length, channels = windows.shape
    longest = config.max_patches * config.patch
    if channels != config.channels:
        raise ConfigError(
            f"windows have {channels} channels, this transformer {config.channels}; select the "
            "channels that it was made for, or make another one."
        )
    if length % config.patch or not 2 * config.patch <= length <= longest:
        raise ConfigError(
            f"windows hold {length} steps; expected a multiple of patch={config.patch} from "
            f"{2 * config.patch} (one patch of context, one to predict) to {longest}."
        )
    return windows.reshape(len(windows), -1, config.patch, channels)


def last_observed(windows: Array, patch: int) -> jax.Array:
    """`(B, T, C)`: for each step, the channel's last observed value before its patch, else 0."""
    observed = jnp.isfinite(windows)
    steps = jnp.arange(windows.shape[1])[:, None]
    newest = jax.lax.cummax(jnp.where(observed, steps, -1), axis=1)
    before = newest[:, jnp.maximum(steps[:, 0] // patch * patch - 1, 0)]
    before = jnp.where(steps < patch, -1, before)
    values = jnp.clip(jnp.where(observed, windows, 0), -_LIMIT, _LIMIT)
    found = jnp.take_along_axis(values, jnp.maximum(before, 0), axis=1)
    return jnp.where(before >= 0, found, 0)


@functools.lru_cache(maxsize=32)
def _abstract(config: SeriesConfig) -> Any:
    """The transformer without its parameters."""
    model = nnx.eval_shape(lambda: PatchDecoder(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)[0]

"""What a forecast of a series is: heads that turn numbers of a network into losses and intervals.

Answers "how surprising is this value?" for a Student-t head (a density: nats, which may be below
zero) and for a quantile head (pinball loss, in the unit of the scaled values). Pure functions of
arrays `(..., K)`, K outputs a predicted value; every one is smooth or piecewise smooth and may be
differentiated twice. Read next: `metagrad_filter.proxy.series`.

References:
  Salinas et al., 2020, https://arxiv.org/abs/1704.04110 (likelihood heads);
  Koenker and Bassett, 1978, Regression quantiles (pinball loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln, stdtrit

from metagrad_filter.errors import ConfigError

Array: TypeAlias = jax.Array | np.ndarray


@dataclass(frozen=True)
class StudentT:
    """A Student-t density: location and scale for each value, one shape for all.

    Its tails let a spike be surprising without moving the whole model, and the fixed shape keeps
    derivatives cheap: no gamma function is differentiated.

    Attributes:
      freedom: degrees of freedom, above 2 so that a variance exists.
      least_scale: added to every scale, in the unit of the scaled values; a stuck channel would
        otherwise have a density without bound.

    Raises:
      ConfigError: a field is out of its domain.
    """

    freedom: float = 5.0
    least_scale: float = 0.02

    def __post_init__(self):
        if not 2 < self.freedom < math.inf:
            raise ConfigError(f"freedom={self.freedom!r}; expected a number above 2.")
        if not 0 < self.least_scale < math.inf:
            raise ConfigError(f"least_scale={self.least_scale!r}; expected a positive number.")

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for each value."""
        return 2

    def losses(self, raw: Array, base: Array, values: Array) -> jax.Array:
        """Nats of each value: `(...)` for raw `(..., 2)`, `base` and `values` `(...)`."""
        location, scale = self._parameters(raw, base)
        z = (values - location) / scale
        half = (self.freedom + 1) / 2
        return jnp.log(scale) + self._constant + half * jnp.log1p(z * z / self.freedom)

    def interval(self, raw: Array, base: Array, level: float) -> tuple[jax.Array, jax.Array]:
        """Bounds of the central interval that holds a value with probability `level`."""
        location, scale = self._parameters(raw, base)
        width = float(stdtrit(self.freedom, (1 + level) / 2)) * scale
        return location - width, location + width

    def point(self, raw: Array, base: Array) -> jax.Array:
        """The median."""
        return self._parameters(raw, base)[0]

    @property
    def _constant(self) -> float:
        v = self.freedom
        return float(gammaln(v / 2) - gammaln((v + 1) / 2) + math.log(v * math.pi) / 2)

    def _parameters(self, raw: Array, base: Array) -> tuple[jax.Array, jax.Array]:
        location = jnp.add(base, raw[..., 0])
        return location, self.least_scale + jax.nn.softplus(raw[..., 1])


@dataclass(frozen=True)
class Quantiles:
    """Quantiles at fixed levels, in order by construction.

    Attributes:
      levels: ascending, in (0, 1); symmetric pairs give intervals, .5 the point forecast.

    Raises:
      ConfigError: levels are not ascending in (0, 1), or lack .5.
    """

    levels: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)

    def __post_init__(self):
        steps = zip((0.0, *self.levels), (*self.levels, 1.0))
        if not isinstance(self.levels, tuple) or not all(a < b for a, b in steps):
            raise ConfigError(f"levels={self.levels!r}; expected ascending numbers in (0, 1).")
        if 0.5 not in self.levels:
            raise ConfigError(f"levels={self.levels!r}; expected .5 among them, the forecast.")

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for each value."""
        return len(self.levels)

    def losses(self, raw: Array, base: Array, values: Array) -> jax.Array:
        """Twice the mean pinball loss over levels, which tends to the CRPS: `(...)`."""
        error = values[..., None] - self._quantiles(raw, base)
        levels = jnp.asarray(self.levels, error.dtype)
        return 2 * jnp.mean(jnp.maximum(levels * error, (levels - 1) * error), axis=-1)

    def interval(self, raw: Array, base: Array, level: float) -> tuple[jax.Array, jax.Array]:
        """Bounds of the central interval; raises `ConfigError` where its levels are not there."""
        ends = [(1 - level) / 2, (1 + level) / 2]
        found = [i for end in ends for i, at in enumerate(self.levels) if math.isclose(end, at)]
        if len(found) != 2:
            raise ConfigError(
                f"an interval of level {level} needs the quantiles {ends[0]:.4g} and "
                f"{ends[1]:.4g}; this head has {self.levels}: add them."
            )
        quantiles = self._quantiles(raw, base)
        return quantiles[..., found[0]], quantiles[..., found[1]]

    def point(self, raw: Array, base: Array) -> jax.Array:
        """The median."""
        return self._quantiles(raw, base)[..., self.levels.index(0.5)]

    def _quantiles(self, raw: Array, base: Array) -> jax.Array:
        middle = self.levels.index(0.5)
        gaps = jax.nn.softplus(raw)
        above = jnp.cumsum(gaps[..., middle + 1 :], axis=-1)
        below = jnp.cumsum(gaps[..., :middle][..., ::-1], axis=-1)[..., ::-1]
        median = (base + raw[..., middle])[..., None]
        return jnp.concatenate([median - below, median, median + above], axis=-1)


Head: TypeAlias = StudentT | Quantiles

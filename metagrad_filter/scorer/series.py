"""The distilled model of the series lane: statistics of each channel, standardised, then a head.

    score = bias + z @ skip [+ relu(z @ hidden_kernel + hidden_bias) @ output_kernel]
    z     = (statistics - center) / scale, cut to [-8, 8]

A higher score means that training on the window lowers the outer metric more. Missing values (NaN,
and inf, which no sensor means) are counted and left out; a window with nothing observed still has a
finite score. All arithmetic has a fixed order in float64, so a window's score does not depend on
the batch it arrives in, on threads or on the processor. Cost: microseconds a window, no jax.

Read next: `kernels/scorer/series.py` (the statistics), `fit_series.py` (how the head is learned).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.scorer import series  # pyright: ignore[reportMissingImports]

MAX_CHANNELS = 1 << 12
MAX_HIDDEN = 1 << 12

DEFINITION = 1
"""Version of the statistics' definition; a scorer fitted on another one is refused."""

_LINEAR = ("center", "scale", "skip")
_DEEP = ("hidden_kernel", "hidden_bias", "output_kernel")
_GOLDEN_COUNT, _GOLDEN_LENGTH = 8, 32


@dataclass(frozen=True, eq=False)
class SeriesScorer:
    """A fitted scorer of multivariate time series windows.

    `F = 26 C` statistics, channel by channel in the order of `kernels.scorer.series.STATISTICS`.

    Attributes:
      channels: C; windows are `(T, C)`. Any T is scored, but several statistics depend on it, so
        filter windows of the length that was fitted.
      center: `(F,)` float32, subtracted from the statistics.
      scale: `(F,)` float32, positive, divides them.
      skip: `(F,)` float32, the linear weights.
      hidden_kernel: `(F, H)` float32, or None for a linear scorer.
      hidden_bias: `(H,)` float32, present with `hidden_kernel`.
      output_kernel: `(H,)` float32, present with `hidden_kernel`.
      bias: added to every score.
      strength: how strongly the filter may act: `inf` keeps the k best, 0 a uniform k, anything
        between draws with logits `strength * gaussian rank score` (Gumbel top-k).
      metadata: JSON types only; where the scorer came from.
      kind: always "series".
    """

    kind: ClassVar[str] = "series"

    channels: int
    center: np.ndarray
    scale: np.ndarray
    skip: np.ndarray
    hidden_kernel: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None
    output_kernel: np.ndarray | None = None
    bias: float = 0.0
    strength: float = math.inf
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check_channels(self.channels)
        _check_number("bias", self.bias, finite=True)
        _check_number("strength", self.strength, finite=False)
        if not self.strength >= 0:
            raise ConfigError(f"strength is {self.strength!r}, expected 0 <= strength <= inf.")
        if not isinstance(self.metadata, dict):
            raise ConfigError(f"metadata is {self.metadata!r}, expected a dict of JSON types.")
        for name, shape in self._shapes().items():
            _check_tensor(name, getattr(self, name), shape)
        if not (self.scale > 0).all():
            raise ConfigError(
                f"scale holds {float(self.scale.min())!r}, expected positive numbers; fit again."
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_LINEAR, (self.features,))
        given = [name for name in _DEEP if getattr(self, name) is not None]
        if not given:
            return shapes
        if len(given) != len(_DEEP):
            missing = sorted(set(_DEEP) - set(given))
            raise ConfigError(f"The deeper part lacks {missing}; give all of {list(_DEEP)}.")
        kernel = np.asarray(self.hidden_kernel)
        if kernel.ndim != 2 or not 1 <= kernel.shape[1] <= MAX_HIDDEN:
            raise ConfigError(
                f"hidden_kernel has shape {kernel.shape}, expected ({self.features}, H) with H in "
                f"[1, {MAX_HIDDEN}]."
            )
        hidden = kernel.shape[1]
        return shapes | {
            "hidden_kernel": (self.features, hidden),
            "hidden_bias": (hidden,),
            "output_kernel": (hidden,),
        }

    @functools.cached_property
    def _head(self) -> series.Head:
        hidden = len(self.hidden_bias) if self.hidden_bias is not None else 0
        return series.Head(
            center=self.center,
            scale=self.scale,
            skip=self.skip,
            kernel=_or_empty(self.hidden_kernel, (self.features, hidden)),
            hidden_bias=_or_empty(self.hidden_bias, (hidden,)),
            output=_or_empty(self.output_kernel, (hidden,)),
            bias=float(self.bias),
        )

    @property
    def features(self) -> int:
        """How many statistics a window has: 26 a channel."""
        return self.channels * len(series.STATISTICS)

    def score(self, windows: np.ndarray) -> np.ndarray:
        """Scores windows; higher is better.

        Args:
          windows: `(N, T, C)` float32, N >= 0, T >= 1; NaN and inf count as missing.

        Returns:
          `(N,)` float32, always finite. Raises `WindowError` for another rank or dtype, and for
          another number of channels.
        """
        return self._head.scores(series.check_windows(windows, self.channels))

    def standardized(self, statistics: np.ndarray) -> np.ndarray:
        """Standardises `(N, C, 26)` float32 statistics: `(N, F)` float64 in [-8, 8]."""
        return self._head.standardized(statistics)

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the arrays of this scorer by field name."""
        return {name: getattr(self, name) for name in self._shapes()}

    def fields(self) -> dict[str, Any]:
        """Returns what else defines the scores, as JSON scalars."""
        return {
            "channels": self.channels,
            "bias": float(self.bias),
            "definition": DEFINITION,
            "statistics": len(series.STATISTICS),
        }

    @classmethod
    def from_parts(
        cls,
        fields: dict[str, Any],
        tensors: dict[str, np.ndarray],
        *,
        strength: float,
        metadata: dict[str, Any],
    ) -> SeriesScorer:
        """Rebuilds a scorer from `fields()` and `tensors()`; raises `ConfigError`."""
        expected = {"channels", "bias", "definition", "statistics"}
        if not isinstance(fields, dict) or set(fields) != expected:
            seen = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise ConfigError(f"The fields are {seen}, expected {sorted(expected)}.")
        for name, value in (("definition", DEFINITION), ("statistics", len(series.STATISTICS))):
            if type(fields[name]) is not int or fields[name] != value:
                raise ConfigError(
                    f"{name} is {fields[name]!r}, this version computes {value}; fit again."
                )
        if not isinstance(tensors, dict) or set(tensors) not in ({*_LINEAR}, {*_LINEAR, *_DEEP}):
            seen = sorted(map(str, tensors)) if isinstance(tensors, dict) else tensors
            raise ConfigError(
                f"The tensors are {seen}, expected {list(_LINEAR)}, with all or none of "
                f"{list(_DEEP)}."
            )
        return cls(
            channels=fields["channels"],
            bias=fields["bias"],
            strength=strength,
            metadata=metadata,
            **tensors,
        )

    def golden_windows(self) -> np.ndarray:
        """Returns `(8, 32, C)` float32 self-test windows, NaN included; they depend on C alone.

        Integer hashing makes them the same on every machine; amplitudes reach from 1/16 to 8 and
        levels from -24 to 32, so that scorers of differently scaled data see something.
        """
        shape = (_GOLDEN_COUNT, _GOLDEN_LENGTH, self.channels)
        state = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
        state = (state + np.uint32(1)) * np.uint32(0x9E3779B1)
        state = (state ^ (state >> np.uint32(15))) * np.uint32(0x85EBCA77)
        state ^= state >> np.uint32(13)
        noise = (state >> np.uint32(8)).astype(np.float64) / 2**23 - 1
        number = np.arange(_GOLDEN_COUNT)[:, None, None]
        windows = noise * 2.0 ** (number - 4) + 8.0 * (number - 3)
        windows[1] = windows[1].cumsum(axis=0)
        windows[state % np.uint32(11) == 0] = np.nan
        windows[2, :, 0] = np.nan
        windows[3, 8:24] = windows[3, 7:8]
        return windows.astype(np.float32)


def _or_empty(array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32) if array is None else array


def _check_channels(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CHANNELS:
        raise ConfigError(f"channels is {value!r}, expected an int in [1, {MAX_CHANNELS}].")


def _check_number(name: str, value: Any, *, finite: bool) -> None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not isinstance(value, (int, float)) or math.isnan(number):
        raise ConfigError(f"{name} is {value!r}, expected a number.")
    if finite and math.isinf(number):
        raise ConfigError(f"{name} is {value!r}, expected a finite number.")


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != shape:
        seen = (
            f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        )
        raise ConfigError(f"{name} is {seen}, expected a float32 array of shape {shape}.")
    if not np.isfinite(value).all():
        raise ConfigError(f"{name} holds NaN or inf; fit again, or inspect the labels.")

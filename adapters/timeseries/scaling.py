"""Scaling of channels, learned from the past only and recorded with the scorer.

    scaling = fit_scaling(train)                       # train: series or stretches before the cut
    Registry(run).publish(scorer, metadata={"scaling": scaling.as_dict()})
    scaling = Scaling.from_dict(registry.load(...).metadata["scaling"])

Answers "in which units does the proxy, and the scorer after it, see a window?". A scorer fitted on
scaled windows means nothing on others, so what scaled them travels in its artifact. Only the rows
handed in are read: hand in the training stretches, and no later value can leak into an earlier
window. Cost: one pass in stretches of bounded memory; "robust" keeps at most a million rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

from .series import Series

METHODS = ("standard", "robust")
# Half of a normal distribution lies within this many deviations of its median: an interquartile
# range divided by twice this is a deviation.
_QUARTILE = 0.6744897501960817
_READ_VALUES = 1 << 20
_ROBUST_ROWS = 1 << 20


@dataclass(frozen=True)
class Scaling:
    """`(values - center) / scale`, for every series alike or for each its own.

    Attributes:
      method: "standard" (mean and deviation) or "robust" (median and interquartile range).
      channels: C names.
      center: C numbers.
      scale: C positive numbers.
      own: centers and scales of single series by name, which go before the common ones; a series
        that was not fitted is scaled by the common ones.
      rows: how many rows were read.
    """

    method: str
    channels: tuple[str, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]
    own: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    rows: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}, expected one of {list(METHODS)}.")
        for name, (center, scale) in {"": (self.center, self.scale), **self.own}.items():
            of = f" of series {name!r}" if name else ""
            if len(center) != len(self.channels) or len(scale) != len(self.channels):
                raise ConfigError(
                    f"center and scale{of} have {len(center)} and {len(scale)} numbers, expected "
                    f"one for each of the channels {list(self.channels)}."
                )
            if not all(map(math.isfinite, center)) or not all(
                math.isfinite(s) and s > 0 for s in scale
            ):
                raise ConfigError(
                    f"center {list(center)} and scale {list(scale)}{of} must be finite, and each "
                    "scale positive; fit again."
                )

    def apply(self, values: np.ndarray, name: str) -> np.ndarray:
        """Scales `(..., C)` values of the series `name`: float32, missing values NaN."""
        center, scale = self.own.get(name, (self.center, self.scale))
        kind = values.dtype.type
        scaled = (values - np.asarray(center, kind)) / np.asarray(scale, kind)
        with np.errstate(over="ignore"):
            return scaled.astype(np.float32, copy=False)

    def undo(self, values: np.ndarray, name: str) -> np.ndarray:
        """Turns scaled `(..., C)` values back into the source's units, float64."""
        center, scale = self.own.get(name, (self.center, self.scale))
        return np.asarray(values, np.float64) * np.asarray(scale) + np.asarray(center)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON types, for the metadata of a scorer."""
        record: dict[str, Any] = {
            "method": self.method,
            "channels": list(self.channels),
            "center": list(self.center),
            "scale": list(self.scale),
            "rows": self.rows,
        }
        if self.own:
            record["series"] = {
                name: {"center": list(center), "scale": list(scale)}
                for name, (center, scale) in self.own.items()
            }
        return record

    @classmethod
    def from_dict(cls, record: Any) -> Scaling:
        """Rebuilds a scaling from `as_dict()`; raises `ConfigError`."""
        try:
            return cls(
                method=record["method"],
                channels=tuple(record["channels"]),
                center=tuple(map(float, record["center"])),
                scale=tuple(map(float, record["scale"])),
                own={
                    name: (tuple(map(float, one["center"])), tuple(map(float, one["scale"])))
                    for name, one in record.get("series", {}).items()
                },
                rows=int(record["rows"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"The recorded scaling cannot be read ({type(error).__name__}: {error}); expected "
                "what Scaling.as_dict() returned."
            ) from None


def fit_scaling(
    series: Sequence[Series], *, method: str = "standard", per_series: bool = False
) -> Scaling:
    """Learns centers and scales from the observed values of training series.

    Args:
      series: the training series or training stretches (`split_by_time`), and nothing else.
      method: "standard": mean and standard deviation; "robust": median and the interquartile range
        in units of a deviation, which a few broken values cannot move. Beyond a million rows
        "robust" reads every k-th row.
      per_series: also learn each series' own; series seen later fall back to the common ones.

    Returns:
      The scaling. A channel that is constant has scale 1, one never observed center 0 and scale 1.

    Raises:
      ConfigError: `method` is unknown.
      WindowError: there is no series, or they differ in channels.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected one of {list(METHODS)}.")
    if not series:
        raise WindowError("There is no series to learn a scaling from; pass the training series.")
    channels = series[0].channels
    for one in series:
        if one.channels != channels:
            raise WindowError(
                f"Series {one.name!r} has the channels {list(one.channels)} and series "
                f"{series[0].name!r} {list(channels)}; select the same channels in one order."
            )
    fit = _standard if method == "standard" else _robust
    center, scale = fit(series)
    own = {}
    if per_series:
        stretches: dict[str, list[Series]] = {}
        for one in series:
            stretches.setdefault(one.name, []).append(one)
        own = {name: fit(parts) for name, parts in stretches.items()}
    rows = sum(len(one) for one in series)
    return Scaling(method, channels, center, scale, own, rows)


def _standard(series: Sequence[Series]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel in one pass, merged stretch by stretch.

    References:
      Chan, Golub & LeVeque, 1983, https://doi.org/10.2307/2683386 (pairwise merging).
    """
    count = mean = squares = np.zeros(len(series[0].channels))
    for rows in _stretches(series):
        seen = np.isfinite(rows)
        here = seen.sum(axis=0)
        own = np.where(seen, rows, 0.0).sum(axis=0) / np.maximum(here, 1)
        spread = (np.where(seen, rows - own, 0.0) ** 2).sum(axis=0)
        total = count + here
        share = here / np.maximum(total, 1)
        squares = squares + spread + (own - mean) ** 2 * count * share
        mean = mean + (own - mean) * share
        count = total
    return _usable(mean, np.sqrt(squares / np.maximum(count, 1)))


def _robust(series: Sequence[Series]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    every = max(1, -(-sum(len(one) for one in series) // _ROBUST_ROWS))
    kept: list[np.ndarray] = []
    first = 0
    for rows in _stretches(series):
        kept.append(rows[first::every])
        first = (first - len(rows)) % every
    rows = np.concatenate(kept)
    center, scale = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for c, column in enumerate(rows.T):
        column = column[np.isfinite(column)]
        if len(column):
            low, center[c], high = np.quantile(column, [0.25, 0.5, 0.75])
            scale[c] = (high - low) / (2 * _QUARTILE)
            # More than half of a channel may be one value, such as rain: then its deviation.
            scale[c] = scale[c] or column.std()
    return _usable(center, scale)


def _usable(center: np.ndarray, scale: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # Rounding leaves a constant channel a deviation of its value's last digits.
    constant = ~(scale > 1e-12 * np.abs(center))
    return tuple(center.tolist()), tuple(np.where(constant, 1.0, scale).tolist())


def _stretches(series: Sequence[Series]) -> Iterator[np.ndarray]:
    for one in series:
        step = max(1, _READ_VALUES // len(one.channels))
        for a in range(0, len(one), step):
            yield one.read(a, min(a + step, len(one))).astype(np.float64)

"""Statistics of time series windows: the numpy definition, and the native code that equals it.

    windows (N, T, C) float32 -> statistics (N, C, 26) float32, one row per channel

NaN and inf count as missing. Every statistic is finite for every input. Those from `spread` on do
not change when a channel is shifted, and those from `roughness` on not when it is scaled either,
so a scorer can tell the shape of a rare event from that of a broken sensor.

The numpy functions are the definition; `series_stats.h` computes the same bits, some seventy
times faster. Only +, -, *, / and square roots on float64 are used, in a fixed order, so the result
depends neither on the batch nor on the machine; logarithms are piecewise linear for that reason.
`statistics` falls back to numpy with one warning per process; METAGRAD_FILTER_NO_NATIVE=1 asks for
numpy without a warning, METAGRAD_FILTER_ISA=portable|avx2|avx512 names the instruction set.

Cost: a few microseconds a window of 256 steps x 8 channels, native, on one core.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.kernels.scorer.loading import (  # pyright: ignore[reportMissingImports]
    ISA,
    forced_reference,
    load,
    warn,
)

_SCORER = "series scorer"

LAGS = (1, 2, 4, 8)
SCALES = (1, 2, 4, 8, 16, 32)
CLIP = 8.0
STATISTICS = (
    "observed",  # share of steps that are observed
    "mean",
    "level",  # mean of the values cut at one standard deviation: moved little by spikes
    "minimum",
    "maximum",
    "spread",  # log2 of the standard deviation
    "roughness",  # log2 of mean |first difference| over the standard deviation
    "jump",  # log2 of the largest |first difference| over the mean one
    "stuck",  # share of first differences that are zero
    "stuck_run",  # longest run of them, as a share of the window
    "asymmetry",  # sum of d |d| over sum of d^2, d the deviation from the mean: in [-1, 1]
    "tail",  # log2 of the kurtosis
    "burst",  # largest share of the energy in one of 8 equal stretches of time
    "trend",  # correlation with time
    *(f"correlation_{lag}" for lag in LAGS),  # autocorrelation
    *(f"detail_{scale}" for scale in SCALES),  # log2 of the share of energy in Haar details
    "surprise",  # log2 of the share of variance that an AR(2) model leaves over
    "shock",  # log2 of the largest squared error of that model over the mean one
)

fallback_calls = 0
"""Calls answered by numpy because the native code did not load or failed (this process)."""

_BLOCKS = 8
_FLOOR = 2.0**-20
_SMALLEST = 2.0**-149
_LIMIT = float(np.finfo(np.float32).max)

# Bounds the temporaries of the reference to some megabytes whatever the batch.
_CHUNK_VALUES = 1 << 17


def check_windows(windows: np.ndarray, channels: int | None = None) -> np.ndarray:
    """Returns `windows` as a C-contiguous `(N, T, C)` float32 array, or raises `WindowError`."""
    array = np.asarray(windows)
    if array.ndim != 3:
        raise WindowError(
            f"Windows have shape {array.shape}, expected (N, T, C): windows x steps x channels; "
            "stack the windows of a batch along a new first axis."
        )
    if array.dtype.kind not in "fiu":
        raise WindowError(
            f"Windows have dtype {array.dtype}, expected real numbers; mark missing values by NaN."
        )
    if 0 in array.shape[1:]:
        raise WindowError(
            f"Windows have shape {array.shape}, expected at least one step and one channel."
        )
    if channels is not None and array.shape[2] != channels:
        raise WindowError(
            f"Windows have {array.shape[2]} channels, the scorer was fitted for {channels}; "
            "select the same channels in the same order, or fit again."
        )
    # Values beyond float32 become inf, which counts as missing.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array, np.float32)


def statistics(windows: np.ndarray) -> np.ndarray:
    """Describes each channel of each window.

    Args:
      windows: `(N, T, C)` float32, N >= 0, T >= 1, C >= 1; NaN and inf count as missing.

    Returns:
      `(N, C, 26)` float32, finite, in the order of `STATISTICS`. Raises `WindowError`.
    """
    windows = check_windows(windows)
    return _answer(
        lambda native, isa: native.statistics(windows, isa),
        lambda: reference_statistics(windows),
    )


@dataclass(frozen=True, eq=False)
class Head:
    """What turns a window's `F = 26 C` statistics into a score; arrays are float32.

    score = bias + z @ skip [+ relu(z @ kernel + hidden_bias) @ output]
    z     = (statistics - center) / scale, cut to [-8, 8]

    Attributes:
      center: `(F,)`.
      scale: `(F,)`, positive.
      skip: `(F,)`.
      kernel: `(F, H)`; H = 0 for a linear head.
      hidden_bias: `(H,)`.
      output: `(H,)`.
      bias: a number.
    """

    center: np.ndarray
    scale: np.ndarray
    skip: np.ndarray
    kernel: np.ndarray
    hidden_bias: np.ndarray
    output: np.ndarray
    bias: float

    def scores(self, windows: np.ndarray) -> np.ndarray:
        """Scores checked `(N, T, C)` float32 windows: `(N,)` float32, finite."""
        return _answer(
            lambda _, isa: self._native.score(windows, isa),
            lambda: self.reference_scores(reference_statistics(windows)),
        )

    def reference_scores(self, found: np.ndarray) -> np.ndarray:
        """The definition: scores of `(N, C, 26)` statistics.

        Sums run over features in order. A BLAS product would round differently for different batch
        sizes, and then a block would be ranked differently by different worker counts.
        """
        z = self.standardized(found)
        total = np.full(len(z), self.bias + 0.0)
        for f in range(z.shape[1]):
            total += z[:, f] * float(self.skip[f])
        if len(self.hidden_bias):
            kernel = self.kernel.astype(np.float64)
            hidden = np.tile(self.hidden_bias.astype(np.float64), (len(z), 1))
            for f in range(z.shape[1]):
                hidden += z[:, f, None] * kernel[f]
            hidden = np.where(hidden > 0.0, hidden, 0.0)
            for h in range(hidden.shape[1]):
                total += hidden[:, h] * float(self.output[h])
        return np.clip(total, -_LIMIT, _LIMIT).astype(np.float32)

    def standardized(self, found: np.ndarray) -> np.ndarray:
        """`(N, C, 26)` statistics -> `(N, F)` float64 in [-8, 8]."""
        flat = found.reshape(len(found), self.center.size).astype(np.float64)
        z = (flat - self.center.astype(np.float64)) / self.scale.astype(np.float64)
        return np.clip(z, -CLIP, CLIP)

    @functools.cached_property
    def _native(self):
        native = _native()
        assert native is not None
        arrays = (self.center, self.scale, self.skip, self.kernel, self.hidden_bias, self.output)
        return native.Head(*(np.ascontiguousarray(a) for a in arrays), self.bias)

    def __getstate__(self):
        # The native copy is rebuilt in each process.
        return {name: value for name, value in self.__dict__.items() if name != "_native"}


def native_available() -> bool:
    """Whether series are scored by native code in this process."""
    return not forced_reference() and _native() is not None


def _native() -> ModuleType | None:
    return load("_series_stats", _SCORER)


def _answer(
    call: Callable[[ModuleType, str], np.ndarray], reference: Callable[[], np.ndarray]
) -> np.ndarray:
    """Runs native code on the chosen instruction set, or the reference where there is none."""
    global fallback_calls
    if forced_reference():
        return reference()
    native = _native()
    if native is not None:
        isa = os.environ.get(ISA, "")
        if isa and isa not in native.isas():
            raise ConfigError(
                f"{ISA} is {isa!r}, this processor runs {', '.join(native.isas())}; name one of "
                "them, or unset the variable to take the best."
            )
        try:
            return call(native, isa)
        except Exception as error:  # whatever it was, numpy gives the same answer
            warn(_SCORER, f"failed ({error})")
    fallback_calls += 1
    return reference()


def reference_statistics(windows: np.ndarray) -> np.ndarray:
    """The definition of `statistics` for `(N, T, C)` float32 windows."""
    count, length, channels = windows.shape
    out = np.empty((count, channels, len(STATISTICS)), np.float32)
    step = max(1, _CHUNK_VALUES // (length * channels))
    for start in range(0, count, step):
        chunk = windows[start : start + step]
        series = chunk.transpose(1, 0, 2).reshape(length, -1)
        out[start : start + step] = _describe(series).reshape(len(chunk), channels, -1)
    return out


def _describe(series: np.ndarray) -> np.ndarray:
    """Statistics `(S, 26)` float64 of `(T, S)` float32 series."""
    length = len(series)
    seen = np.isfinite(series)
    # Adding zero turns -0 into 0, so that equal values are equal bits.
    x = np.where(seen, series, 0.0).astype(np.float64) + 0.0
    time = np.arange(length, dtype=np.float64)[:, None]
    observed = _sum(seen)
    count = np.maximum(observed, 1.0)
    present = observed > 0
    mean = _sum(x) / count
    found: dict[str, np.ndarray] = {
        "observed": observed / length,
        "mean": mean,
        "minimum": np.where(present, np.where(seen, x, np.inf).min(axis=0), 0.0),
        "maximum": np.where(present, np.where(seen, x, -np.inf).max(axis=0), 0.0),
    }

    both = seen[1:] & seen[:-1]
    size = np.where(both, np.abs(x[1:] - x[:-1]), 0.0)
    still = both & (size == 0.0)
    neighbours = np.maximum(_sum(both), 1.0)
    roughness = _sum(size) / neighbours
    found["jump"] = _log2(_ratio(size.max(axis=0, initial=0.0), roughness), 1.0)
    found["stuck"] = _sum(still) / neighbours
    found["stuck_run"] = _longest_run(still) / max(length - 1.0, 1.0)

    d = np.where(seen, x - mean, 0.0)
    square = d * d
    energy = _sum(square)
    variance = energy / count
    deviation = np.sqrt(variance)
    times = _sum(np.where(seen, time, 0.0))
    time_energy = _sum(np.where(seen, time * time, 0.0)) - times * times / count
    edges = [block * length // _BLOCKS for block in range(_BLOCKS + 1)]
    blocks = [_sum(square[a:b]) for a, b in itertools.pairwise(edges)]
    joint = np.sqrt(np.maximum(energy * time_energy, 0.0))
    found |= {
        "spread": _log2(deviation, _SMALLEST),
        "roughness": _log2(_ratio(roughness, deviation), _FLOOR),
        "asymmetry": _ratio(_sum(d * np.abs(d)), energy),
        "tail": _log2(_ratio(_sum(square * square) / count, variance * variance), 1.0),
        "burst": _ratio(np.max(blocks, axis=0), energy),
        "trend": np.clip(_ratio(_sum(time * d), joint), -1.0, 1.0),
    }
    for lag in LAGS:
        together = np.maximum(_sum(seen[lag:] & seen[:-lag]), 1.0)
        product = _sum(d[lag:] * d[:-lag]) / together
        found[f"correlation_{lag}"] = np.clip(_ratio(product, variance), -1.0, 1.0)

    sums, weight = d, 1.0
    for scale in SCALES:
        weight *= 0.5
        first, second = sums[: len(sums) // 2 * 2 : 2], sums[1::2]
        detail = _sum((second - first) * (second - first)) * weight
        found[f"detail_{scale}"] = _log2(_ratio(detail, energy), _FLOOR)
        sums = first + second

    # Yule-Walker in closed form.
    r1, r2 = found["correlation_1"], found["correlation_2"]
    second = np.clip(_ratio(r2 - r1 * r1, 1.0 - r1 * r1), -1.0, 1.0)
    first = r1 * (1.0 - second)
    three = seen[2:] & seen[1:-1] & seen[:-2]
    error = d[2:] - first * d[1:-1] - second * d[:-2]
    residual = np.where(three, error * error, 0.0)
    unexplained = _sum(residual) / np.maximum(_sum(three), 1.0)
    usual = np.maximum(unexplained, variance * _FLOOR)
    found |= {
        "level": mean + _sum(np.clip(d, -deviation, deviation)) / count,
        "surprise": _log2(_ratio(unexplained, variance), _FLOOR),
        "shock": _log2(_ratio(residual.max(axis=0, initial=0.0), usual), 1.0),
    }
    return np.stack([found[name] for name in STATISTICS], axis=1)


def _sum(rows: np.ndarray) -> np.ndarray:
    """Sums `(T, S)` over time, one step after the other.

    numpy's own reductions add pairwise, and the order of the sum is part of the definition.
    """
    total = np.zeros(rows.shape[1:])
    for row in rows:
        total += row
    return total


def _longest_run(true: np.ndarray) -> np.ndarray:
    run = np.zeros(true.shape[1:])
    longest = run.copy()
    for row in true:
        run = np.where(row, run + 1.0, 0.0)
        np.maximum(longest, run, out=longest)
    return longest


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a / b`, and 0 where b is not positive."""
    return np.where(b > 0.0, a / np.where(b > 0.0, b, 1.0), 0.0)


def _log2(values: np.ndarray, floor: float) -> np.ndarray:
    """Exponent plus linear mantissa: log2 at powers of two, straight between them.

    Unlike a library's logarithm it has the same bits everywhere; it is never off by more than 0.09.
    """
    fraction, exponent = np.frexp(np.maximum(values, floor))
    return (exponent - 1.0) + (2.0 * fraction - 1.0)

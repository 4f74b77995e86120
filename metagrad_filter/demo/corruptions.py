"""Broken windows of known kind and severity: what a filter of time series must not keep.

    broken = CORRUPTIONS["stuck"](windows, 0.5, np.random.default_rng(0))

Each is a pure function `(windows (N, T, C), severity in (0, 1], rng) -> (N, T, C) float32` of
scaled windows (unit deviation), reads its argument only and leaves missing values missing.
One-channel faults choose for each window a channel that changes in it. Severity is the share of the
window, or the size in deviations, that is broken; what exactly is said at each function.

Most of them raise a model's loss as much as a rare event does, which is the point: surprise cannot
tell them apart. `stuck` and `shift` do not, which makes them the harder ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

_TRIES = 32

Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def dropout(windows: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """A sensor fault: the channel falls to the rail (-4 deviations) for single steps.

    Half of the severity is the share of steps, at least one.
    """
    broken, rows, channels = _begin(windows, severity, rng)
    length = windows.shape[1]
    lost = _places(rng, len(windows), length, max(1, round(length * severity / 2)))
    rail = np.full(lost.shape, -4.0, np.float32)
    return _end(windows, broken, rows, channels, lost, rail)


def offset(windows: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """A sensor fault: the channel is off by 4 `severity` deviations from a random step on."""
    broken, rows, channels = _begin(windows, severity, rng)
    length = windows.shape[1]
    first = rng.integers(1, max(2, length // 2), len(windows))
    after = np.arange(length) >= first[:, None]
    sign = rng.choice([-1.0, 1.0], len(windows))
    moved = broken[rows, :, channels] + (4 * severity * sign)[:, None]
    return _end(windows, broken, rows, channels, after, moved)


def shuffle(windows: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Rows in a stretch of `severity` of the window are in random order, all channels together."""
    broken, _, _ = _begin(windows, severity, rng)
    length = windows.shape[1]
    stretch = min(length, max(3, round(length * severity)))
    for i, first in enumerate(rng.integers(0, length - stretch + 1, len(windows))):
        order = rng.permutation(stretch)
        # A permutation that moves nothing would leave the window whole.
        while (order == np.arange(stretch)).all():
            order = rng.permutation(stretch)
        broken[i, first : first + stretch] = windows[i, first + order]
    return broken


def stuck(windows: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """The channel repeats one value for `severity` of the window, at least three steps."""
    broken, rows, channels = _begin(windows, severity, rng)
    length = windows.shape[1]
    stretch = min(length, max(3, round(length * severity)))
    first = rng.integers(0, length - stretch + 1, len(windows))
    steps = np.arange(length)
    still = (steps >= first[:, None]) & (steps < (first + stretch)[:, None])
    held = broken[rows, first, channels]
    return _end(windows, broken, rows, channels, still, held[:, None])


def spikes(windows: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Single readings are off by 2 to 2 + 6 `severity` deviations; a quarter of it as many."""
    broken, rows, channels = _begin(windows, severity, rng)
    length = windows.shape[1]
    hit = _places(rng, len(windows), length, max(1, round(length * severity / 4)))
    size = rng.uniform(2, 2 + 6 * severity, hit.shape) * rng.choice([-1.0, 1.0], hit.shape)
    return _end(windows, broken, rows, channels, hit, broken[rows, :, channels] + size)


def shift(windows: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """The channel happens at the wrong time: moved by half of `severity` of the window.

    Earlier or later, the gap filled with its outermost value, so that the event in it looks real
    and only its relation to the other channels is wrong.
    """
    broken, rows, channels = _begin(windows, severity, rng)
    length = windows.shape[1]
    by = max(1, round(length * severity / 2)) * rng.choice([-1, 1], len(windows))
    source = np.clip(np.arange(length) - by[:, None], 0, length - 1)
    moved = np.take_along_axis(broken[rows, :, channels], source, axis=1)
    return _end(windows, broken, rows, channels, np.ones_like(moved, bool), moved)


def noise(windows: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Unlearnable and of high loss: white noise of up to 3 deviations is added to all channels."""
    broken, _, _ = _begin(windows, severity, rng)
    return broken + (3 * severity * rng.normal(size=windows.shape)).astype(np.float32)


CORRUPTIONS: dict[str, Corruption] = {
    "dropout": dropout,
    "offset": offset,
    "shuffle": shuffle,
    "stuck": stuck,
    "spikes": spikes,
    "shift": shift,
    "noise": noise,
}


def corrupt(windows: np.ndarray, kind: str, severity: float, *, seed: int) -> np.ndarray:
    """Breaks windows in one way.

    Args:
      windows: `(N, T, C)` float32, scaled; NaN is missing. T at least 4.
      kind: a name in `CORRUPTIONS`.
      severity: in (0, 1].
      seed: of everything random.

    Returns:
      `(N, T, C)` float32; as much is missing as was. A window that chance left as it was, because
      the damage fell on missing or equal values, is broken again, so that only windows that
      cannot be changed (constant or unobserved ones) stay.

    Raises:
      ConfigError: `kind` or `severity` is out of its domain.
      WindowError: the windows have another shape.
    """
    if kind not in CORRUPTIONS:
        raise ConfigError(f"kind is {kind!r}, expected one of {list(CORRUPTIONS)}.")
    rng = np.random.default_rng(seed)
    broken = CORRUPTIONS[kind](windows, severity, rng)
    for _ in range(_TRIES):
        same = np.flatnonzero(((broken == windows) | np.isnan(windows)).all(axis=(1, 2)))
        if not len(same):
            break
        broken[same] = CORRUPTIONS[kind](windows[same], severity, rng)
    return broken


def _begin(
    windows: np.ndarray, severity: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks; returns a copy, the windows' numbers and a channel for each."""
    if windows.ndim != 3 or windows.shape[1] < 4:
        raise WindowError(
            f"Windows have shape {windows.shape}, expected (N, T, C) with at least 4 steps."
        )
    if not isinstance(severity, (int, float)) or not 0 < severity <= 1 or math.isnan(severity):
        raise ConfigError(f"severity is {severity!r}, expected a number in (0, 1].")
    seen = np.isfinite(windows)
    low = np.where(seen, windows, np.inf).min(axis=1)
    changes = np.where(seen, windows, -np.inf).max(axis=1) > low
    channels = np.where(changes, rng.random(changes.shape), -1.0).argmax(axis=1)
    return windows.astype(np.float32), np.arange(len(windows)), channels


def _end(
    windows: np.ndarray,
    broken: np.ndarray,
    rows: np.ndarray,
    channels: np.ndarray,
    where: np.ndarray,
    values: np.ndarray,
) -> np.ndarray:
    """Sets one channel of each window where `(N, T)` says so; what was missing stays missing."""
    column = broken[rows, :, channels]
    # A value that was held or moved from a missing place is none.
    broken[rows, :, channels] = np.where(where & ~np.isnan(values), values, column)
    broken[np.isnan(windows)] = np.nan
    return broken


def _places(rng: np.random.Generator, count: int, length: int, each: int) -> np.ndarray:
    """`(count, length)` bool with `each` random places a row."""
    order = rng.random((count, length)).argsort(axis=1)
    return order < each

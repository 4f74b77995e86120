"""Which stretches of a series are windows, and what is wrong with the others.

Pure functions on stacks of windows `(W, T, C)`; NaN is what was not observed. A window that is
dropped has exactly one reason, the first in the order of `judge`. Cost: some ten passes over the
values, about 10 us a window of 256 steps x 8 channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError

from .problems import Reason

FATES = ("keep", "drop")

# In the order of `judge`; the position plus one is the code of a dropped window.
REASONS = (
    Reason.TIME_GAP,
    Reason.NOT_OBSERVED,
    Reason.MISSING_RUN,
    Reason.MISSING_CHANNEL,
    Reason.CONSTANT_CHANNEL,
)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How series become windows.

    Attributes:
      length: T, steps per window.
      stride: steps from one window's start to the next; None means `length`, no overlap.
      min_observed: share of a window's values that must be observed, in [0, 1]; at least one value
        must be, for a window that says nothing cannot be ranked.
      max_missing_run: most steps in a row with no channel observed; None means no limit.
      max_gap: largest difference between neighbouring times, in their unit; None means no limit.
      missing_channel: "keep" or "drop" windows in which a channel was never observed.
      constant_channel: "keep" or "drop" windows in which a channel never changes. Both are kept by
        default, and noted: a silent channel may be what a rare state looks like.
    """

    length: int
    stride: int | None = None
    min_observed: float = 0.5
    max_missing_run: int | None = None
    max_gap: float | None = None
    missing_channel: str = "keep"
    constant_channel: str = "keep"

    def __post_init__(self):
        _check_count("length", self.length, 2, "one step to read and one to predict")
        if self.stride is not None:
            _check_count("stride", self.stride, 1, "windows that move on")
        if self.max_missing_run is not None:
            _check_count("max_missing_run", self.max_missing_run, 0, "a number of steps")
        if not _is_number(self.min_observed) or not 0 <= self.min_observed <= 1:
            raise ConfigError(f"min_observed is {self.min_observed!r}, expected a share in [0, 1].")
        if self.max_gap is not None and (not _is_number(self.max_gap) or not self.max_gap > 0):
            raise ConfigError(
                f"max_gap is {self.max_gap!r}, expected a positive number in the unit of the times "
                "(nanoseconds for dates), or None."
            )
        for name in ("missing_channel", "constant_channel"):
            if getattr(self, name) not in FATES:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, expected one of {list(FATES)}."
                )

    @property
    def step(self) -> int:
        """Steps from one window's start to the next."""
        return self.length if self.stride is None else self.stride

    def starts(self, rows: int, *, first: int = 0) -> np.ndarray:
        """First rows of the windows that `rows` rows hold, from `first` on, `(W,)` int64."""
        return np.arange(first, max(first, rows - self.length + 1), self.step, dtype=np.int64)

    def count(self, rows: int) -> int:
        """How many windows `rows` rows hold."""
        return 0 if rows < self.length else (rows - self.length) // self.step + 1


def windows_at(rows: np.ndarray, first: int, count: int, cut: Cut) -> np.ndarray:
    """Takes `count` `(W, T, C)` windows out of `(n, C)` rows, from row `first` on; a view."""
    every = np.lib.stride_tricks.sliding_window_view(rows[first:], cut.length, axis=0)
    return every[:: cut.step][:count].transpose(0, 2, 1)


def judge(
    windows: np.ndarray, cut: Cut, *, gaps: np.ndarray | None = None
) -> tuple[np.ndarray, dict[Reason, int]]:
    """Says which windows are dropped and why.

    Args:
      windows: `(W, T, C)` floats; NaN and inf count as missing.
      cut: the limits.
      gaps: `(W,)` bool, whether a window spans a gap in time; None where times are not known.

    Returns:
      `(codes, noted)`: `(W,)` int8, 0 for a window that stays, else the position of its reason in
      `REASONS` plus one; and how many windows that stay have a channel that is missing or constant.
    """
    seen = np.isfinite(windows)
    count, length, channels = windows.shape
    codes = np.zeros(count, np.int8)
    if gaps is not None:
        _mark(codes, gaps, Reason.TIME_GAP)
    if np.isinf(windows).any():
        windows = np.where(seen, windows, np.nan)
    # These two pass over what is missing; a channel without any value is NaN in both.
    low, high = _fold(np.fmin, windows), _fold(np.fmax, windows)
    per_channel = np.full((count, channels), length)
    if not seen.all():
        per_channel = _fold(np.add, seen.astype(np.int32))
        observed = per_channel.sum(axis=1)
        needed = max(1.0, cut.min_observed * length * channels)
        _mark(codes, observed < needed, Reason.NOT_OBSERVED)
        if cut.max_missing_run is not None:
            run = longest_run(np.logical_not(seen.any(axis=2)))
            _mark(codes, run > cut.max_missing_run, Reason.MISSING_RUN)
    missing = (per_channel == 0).any(axis=1)
    # One value alone is no constant: nothing says that it would have stayed.
    constant = ((low == high) & (per_channel > 1)).any(axis=1)
    noted: dict[Reason, int] = {}
    for odd, reason, fate in (
        (missing, Reason.MISSING_CHANNEL, cut.missing_channel),
        (constant, Reason.CONSTANT_CHANNEL, cut.constant_channel),
    ):
        if fate == "drop":
            _mark(codes, odd, reason)
    for odd, reason, fate in (
        (missing, Reason.MISSING_CHANNEL, cut.missing_channel),
        (constant, Reason.CONSTANT_CHANNEL, cut.constant_channel),
    ):
        if fate == "keep" and (kept := int(np.count_nonzero(odd & (codes == 0)))):
            noted[reason] = kept
    return codes, noted


def longest_run(true: np.ndarray) -> np.ndarray:
    """Longest run of True along the last axis of `(W, T)` bool: `(W,)` int64."""
    steps = np.arange(1, true.shape[1] + 1)
    # The last False before each step, so that the distance to it is the length of the run.
    start = np.maximum.accumulate(np.where(true, 0, steps), axis=1)
    return np.where(true, steps - start, 0).max(axis=1, initial=0)


def _fold(ufunc: np.ufunc, windows: np.ndarray) -> np.ndarray:
    """Reduces `(W, T, C)` over time to `(W, C)` by halves.

    numpy reduces a middle axis in steps of C values, which is ten times slower where C is small.
    """
    while (length := windows.shape[1]) > 1:
        half = length // 2
        folded = ufunc(windows[:, :half], windows[:, half : 2 * half])
        if length % 2:
            folded[:, 0] = ufunc(folded[:, 0], windows[:, -1])
        windows = folded
    return windows[:, 0]


def _mark(codes: np.ndarray, odd: np.ndarray, reason: Reason) -> None:
    codes[(codes == 0) & odd] = REASONS.index(reason) + 1


def _check_count(name: str, value: Any, low: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}, expected an int >= {low} ({why}).")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)

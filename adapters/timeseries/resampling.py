"""Irregular times and event streams onto a regular grid, without a look into the future.

    series = resample(series, step=np.timedelta64(1, "h"), how="mean", carry=2)
    series = from_events(events, channels=["pulse", "pressure"], step=1.0)

A step's value comes from readings within `[t, t + step)`: the last one or their mean. An empty step
repeats the value before it for at most `carry` steps and is missing after that; nothing is
interpolated, for that would let a window know what comes after it. Grids start at a multiple of the
step, so series of one source share one grid. Cost: linear in readings and steps, in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

from .problems import Fate, Problems, Reason
from .series import Series, in_order, time_numbers

HOW = ("last", "mean")
# One wrong year among nanoseconds asks for a grid that no memory holds.
_MOST_STEPS = 1 << 26


def resample(
    series: Sequence[Series], *, step: Any, how: str = "last", carry: int = 0
) -> list[Series]:
    """Puts series with times onto a regular grid of their own times.

    Args:
      series: with times; each is read whole.
      step: distance of the grid's times, in their unit; a `timedelta64` for dates.
      how: "last" observed value of a step, or their "mean", for each channel.
      carry: steps that a value may stand for when none follows it.

    Returns:
      Series of the same names and channels; values float64, times a `range` where they are whole.

    Raises:
      ConfigError: `step`, `how` or `carry` is out of its domain.
      WindowError: a series has no times, or its grid would not fit into memory.
    """
    found = []
    for one in series:
        times = one.times_of(0, len(one))
        if times is None:
            raise WindowError(
                f"Series {one.name!r} has no times to resample by; give times= when it is read."
            )
        rows = one.read(0, len(one))
        seen = np.isfinite(rows)
        row, channel = np.nonzero(seen)
        grid, axis = on_grid(
            times[row], channel, rows[seen], len(one.channels), step=step, how=how, carry=carry,
            name=one.name, span=(times[0], times[-1]) if len(times) else None,
        )  # fmt: skip
        found.append(Series(name=one.name, values=grid, channels=one.channels, times=axis))
    return found


def from_events(
    events: Iterable[tuple[Any, Any, Any]] | tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    channels: Sequence[str],
    step: Any,
    how: str = "last",
    carry: int = 0,
    name: str = "events",
    problems: Problems | None = None,
) -> Series:
    """Makes one series of a stream of `(time, channel, value)`.

    Args:
      events: triples in any order, or three arrays; times are dates or numbers.
      channels: the channels to keep, in order; events of others are counted and left out.
      step: as for `resample`.
      how: as for `resample`; of events at one time the last one given counts.
      carry: as for `resample`.
      name: the series' name.
      problems: counts late events (sorted in), unknown channels, and times and values that are
        none.

    Returns:
      The series, `(n, C)` float64.

    Raises:
      ConfigError: as for `resample`, or a channel is named twice.
      WindowError: no event is left, or the grid would not fit into memory.
    """
    problems = Problems() if problems is None else problems
    if len(set(channels)) != len(channels) or not channels:
        raise ConfigError(f"channels are {list(channels)}, expected names, each once.")
    where = f"series {name!r}"
    if isinstance(events, tuple) and len(events) == 3 and isinstance(events[0], np.ndarray):
        raw_times, raw_channels, raw_values = events
    else:
        rows = list(events)
        if any(len(row) != 3 for row in rows):
            raise WindowError("An event is no (time, channel, value); expected three entries each.")
        raw_times = np.array([row[0] for row in rows])
        raw_channels = np.array([str(row[1]) for row in rows])
        raw_values = [row[2] for row in rows]
    times = np.asarray(time_numbers(raw_times)) if len(raw_times) else np.zeros(0)
    values = numbers(raw_values, where=where, problems=problems)
    place = {channel: i for i, channel in enumerate(channels)}
    codes = np.array([place.get(str(channel), -1) for channel in raw_channels], np.int64)
    problems.add(Fate.DROPPED, Reason.UNKNOWN_CHANNEL, int((codes < 0).sum()), where=where)
    table = np.stack([codes.astype(np.float64), values], axis=1)[codes >= 0]
    own = Problems()
    table, times = in_order(table, times[codes >= 0], name=name, problems=own, distinct=False)
    for reason in (Reason.UNREADABLE_TIME, Reason.SHUFFLED_TIMES):
        fate = Fate.DROPPED if reason == Reason.UNREADABLE_TIME else Fate.REPAIRED
        problems.add(fate, reason, own.count(reason), where=where)
    seen = np.isfinite(table[:, 1])
    if not seen.any():
        raise WindowError(f"No event of the channels {list(channels)} is left ({problems}).")
    times = np.asarray(times)
    grid, axis = on_grid(
        times[seen], table[seen, 0].astype(np.int64), table[seen, 1], len(channels),
        step=step, how=how, carry=carry, name=name, span=(times[0], times[-1]),
    )  # fmt: skip
    return Series(name=name, values=grid, channels=tuple(channels), times=axis)


def on_grid(
    times: np.ndarray,
    channel: np.ndarray,
    values: np.ndarray,
    width: int,
    *,
    step: Any,
    how: str,
    carry: int,
    name: str,
    span: tuple[Any, Any] | None,
) -> tuple[np.ndarray, np.ndarray | range]:
    """Bins `(k,)` readings in the order of time to `(n, width)` float64; returns values and times.

    `span` holds the first and the last time that the grid must cover.
    """
    if how not in HOW:
        raise ConfigError(f"how is {how!r}, expected one of {list(HOW)}.")
    if isinstance(carry, bool) or not isinstance(carry, int) or carry < 0:
        raise ConfigError(f"carry is {carry!r}, expected an int >= 0: a number of steps.")
    step = _step(step, times.dtype)
    if span is None:
        return np.empty((0, width)), np.zeros(0, times.dtype)
    first = math.floor(span[0] / step) if isinstance(step, float) else int(span[0]) // step
    last = math.floor(span[1] / step) if isinstance(step, float) else int(span[1]) // step
    count = last - first + 1
    if count * width > _MOST_STEPS:
        raise WindowError(
            f"Series {name!r} from {span[0]} to {span[1]} makes {count} steps of {step}, expected "
            f"at most {_MOST_STEPS // width}; look for a wrong time, or use a longer step."
        )
    bins = np.floor_divide(times, step).astype(np.int64) - first
    grid = np.full((count, width), np.nan)
    if how == "last":
        grid[bins, channel] = values  # of equal places the last one stays
    else:
        flat = bins * width + channel
        total = np.bincount(flat, values, minlength=count * width)
        readings = np.bincount(flat, minlength=count * width)
        some = readings > 0
        grid.reshape(-1)[some] = total[some] / readings[some]
    if carry:
        carry_on(grid, carry)
    if isinstance(step, int):
        return grid, range(first * step, (last + 1) * step, step)
    return grid, (first + np.arange(count)) * step


def carry_on(grid: np.ndarray, carry: int) -> None:
    """Repeats values of `(n, C)` over at most `carry` missing steps after them, in place."""
    steps = np.arange(len(grid))[:, None]
    seen = ~np.isnan(grid)
    last = np.maximum.accumulate(np.where(seen, steps, -1), axis=0)
    fill = ~seen & (last >= 0) & (steps - last <= carry)
    row, column = np.nonzero(fill)
    grid[row, column] = grid[last[row, column], column]


def numbers(raw: Any, *, where: str, problems: Problems) -> np.ndarray:
    """Reads values as float64; what is no number is counted and becomes NaN."""
    try:
        return np.array(raw, np.float64)
    except (TypeError, ValueError):
        pass
    found = np.full(len(raw), np.nan)
    unreadable = 0
    for i, value in enumerate(raw):
        try:
            found[i] = float(value)
        except (TypeError, ValueError):
            unreadable += value is not None
    problems.add(Fate.REPAIRED, Reason.UNREADABLE_VALUE, unreadable, where=where)
    return found


def _step(step: Any, dtype: np.dtype) -> int | float:
    if isinstance(step, np.timedelta64):
        step = int(step.astype("timedelta64[ns]").astype(np.int64))
    number = isinstance(step, (int, float, np.integer, np.floating)) and not isinstance(step, bool)
    if not number or not math.isfinite(step) or not step > 0:
        raise ConfigError(
            f"step is {step!r}, expected a positive number in the unit of the times, or a "
            "timedelta64 for dates."
        )
    whole = float(step).is_integer() and dtype.kind == "i"
    return int(step) if whole else float(step)

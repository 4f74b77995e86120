"""What was wrong with a source of time series, as typed reasons with counts.

    problems = Problems()
    series = read_csv("weather.csv", ..., problems=problems)
    windows = WindowSource(series, Cut(length=24), problems=problems)
    print(problems)            # dropped: time_gap 12; repaired: duplicate_times 3

Three things can happen to what is odd. It is `dropped` where no window can hold it, `repaired`
where there is one obvious right reading, or `noted` where it is passed on as it is because the
scorer knows how to read it. Nothing is silent: each is counted under its `Reason`, and the first
places are kept. A file that cannot be used at all is a `DataError` or a `WindowError` instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum

_PLACES = 5


class Fate(StrEnum):
    """What became of something odd."""

    DROPPED = "dropped"
    REPAIRED = "repaired"
    NOTED = "noted"


class Reason(StrEnum):
    """Why a window, a row, a value or a series is odd; the unit that is counted stands first."""

    TOO_SHORT = "too_short"  # series: fewer rows than a window has
    RAGGED_CHANNELS = "ragged_channels"  # series: other channels than the first series
    RAGGED_ROW = "ragged_row"  # rows: more or fewer cells than the header
    UNREADABLE_TIME = "unreadable_time"  # rows: no time, so no place in the series
    SHUFFLED_TIMES = "shuffled_times"  # rows: earlier than a row before them; sorted
    DUPLICATE_TIMES = "duplicate_times"  # rows: at the time of another; the last one counts
    UNREADABLE_VALUE = "unreadable_value"  # values: no number; missing
    NON_FINITE = "non_finite"  # values: infinite; missing
    UNKNOWN_CHANNEL = "unknown_channel"  # events: of a channel that was not asked for
    NOT_OBSERVED = "not_observed"  # windows: fewer values than `min_observed`
    MISSING_RUN = "missing_run"  # windows: a stretch of steps with nothing observed
    TIME_GAP = "time_gap"  # windows: neighbouring rows further apart than `max_gap`
    MISSING_CHANNEL = "missing_channel"  # windows: a channel without one observed value
    CONSTANT_CHANNEL = "constant_channel"  # windows: a channel with one value throughout


class Problems:
    """Counts of what was odd, by fate and reason, and the first places of each."""

    def __init__(self):
        self._counts: Counter[tuple[Fate, Reason]] = Counter()
        self._places: dict[tuple[Fate, Reason], list[str]] = {}

    def add(self, fate: Fate, reason: Reason, count: int = 1, *, where: str = "") -> None:
        """Counts `count` cases; `where` names the place of the first of them."""
        if count <= 0:
            return
        key = (fate, reason)
        self._counts[key] += int(count)
        places = self._places.setdefault(key, [])
        if where and len(places) < _PLACES:
            places.append(where)

    def count(self, reason: Reason | str) -> int:
        """Returns how often a reason was met, whatever became of it."""
        return sum(n for (_, found), n in self._counts.items() if found == Reason(reason))

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns `{"dropped": {"too_short": 3}, ...}`, JSON types, sorted by name."""
        found: dict[str, dict[str, int]] = {}
        for (fate, reason), n in sorted(self._counts.items()):
            found.setdefault(fate.value, {})[reason.value] = n
        return found

    def places(self) -> Mapping[tuple[Fate, Reason], list[str]]:
        """Returns the first places, at most five for each fate and reason."""
        return {key: list(places) for key, places in self._places.items()}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        parts = (
            f"{fate}: " + ", ".join(f"{reason} {n}" for reason, n in reasons.items())
            for fate, reasons in self.counts().items()
        )
        return "; ".join(parts) or "nothing odd"

    def __repr__(self) -> str:
        return f"Problems({self})"

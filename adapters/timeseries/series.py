"""A multivariate series: rows of channels in the order of time, read a stretch at a time.

Answers "what is a series, wherever its values are kept?". `values` is an array, a memory map or a
store that answers `values[a:b]`; only what is asked for is read. Times are nanoseconds since 1970
(int64) where the source has dates, else the source's own numbers; a regular axis may be a `range`,
which takes no memory. Cost: none until rows are read.

Read next: `windows.py` (rows to windows), `scaling.py`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.errors import DataError, WindowError

from .problems import Fate, Problems, Reason

Times = np.ndarray | range | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """One series, or the stretch `begin .. end - 1` of one.

    Attributes:
      name: what splits and metadata know it by.
      values: `(n, C)`; has `shape`, `dtype` and `values[a:b]`.
      channels: C names.
      times: `(n,)` strictly ascending, or None where rows are only numbered.
      missing: values that the source writes for "not observed", such as -9999.
      begin: first row of `values` that belongs to this stretch.
      end: one past the last; None means all.
    """

    name: str
    values: Any = field(repr=False)
    channels: tuple[str, ...]
    times: Times = field(default=None, repr=False)
    missing: tuple[float, ...] = ()
    begin: int = 0
    end: int | None = None

    def __post_init__(self):
        shape = tuple(self.values.shape)
        if len(shape) != 2 or shape[1] == 0:
            raise WindowError(
                f"Series {self.name!r} has values of shape {shape}, expected (n, C) with at least "
                "one channel: rows x channels."
            )
        if np.dtype(self.values.dtype).kind not in "fiub":
            raise WindowError(
                f"Series {self.name!r} has values of dtype {self.values.dtype}, expected numbers; "
                "mark what is missing by NaN, or name its number with missing=."
            )
        if len(self.channels) != shape[1]:
            raise WindowError(
                f"Series {self.name!r} has {shape[1]} channels and {len(self.channels)} names "
                f"{list(self.channels)}; name each channel once."
            )
        if self.times is not None and len(self.times) != shape[0]:
            raise WindowError(
                f"Series {self.name!r} has {shape[0]} rows and {len(self.times)} times, expected "
                "one for each row."
            )
        end = shape[0] if self.end is None else self.end
        if not 0 <= self.begin <= end <= shape[0]:
            raise WindowError(
                f"Series {self.name!r} has {shape[0]} rows, rows {self.begin} to {end} were asked "
                "for; expected 0 <= begin <= end <= rows."
            )
        object.__setattr__(self, "end", end)

    def __len__(self) -> int:
        assert self.end is not None
        return self.end - self.begin

    def part(self, a: int, b: int) -> Series:
        """Returns rows `a .. b - 1` of this stretch, unread."""
        return replace(self, begin=self.begin + a, end=self.begin + b)

    def read(self, a: int, b: int) -> np.ndarray:
        """Reads rows `a .. b - 1` of this stretch.

        Returns:
          `(b - a, C)`, float32 where the source holds no more than that, else float64, which
          scaling needs for small changes of large values. NaN and inf as in the source.
        """
        return self.numbers(self.values[self.begin + a : self.begin + b])

    def numbers(self, raw: Any) -> np.ndarray:
        """Turns raw values into a float array of its own, `missing` into NaN."""
        raw = np.asarray(raw)
        narrow = raw.dtype.kind in "fiub" and raw.dtype.itemsize <= (
            4 if raw.dtype.kind == "f" else 2
        )
        rows = np.array(raw, np.float32 if narrow else np.float64)
        for value in self.missing:
            rows[raw == np.asarray(value).astype(raw.dtype)] = np.nan
        return rows

    def times_of(self, a: int, b: int) -> np.ndarray | None:
        """Returns the times of rows `a .. b - 1` of this stretch, or None."""
        if self.times is None:
            return None
        return np.asarray(self.times[self.begin + a : self.begin + b])


def from_arrays(
    arrays: Any,
    *,
    times: Any = None,
    channels: Sequence[str] | None = None,
    missing: Sequence[float] = (),
    problems: Problems | None = None,
) -> list[Series]:
    """Makes series of arrays in memory or memory maps; nothing is copied that is in order.

    Args:
      arrays: `(n, C)` for one series or `(n,)` for one of one channel, `(S, n, C)` for S series, a
        sequence of such arrays, or a mapping of names to them. Series may differ in length.
      times: as `arrays`: one `(n,)` array for all, a sequence, or a mapping; dates or numbers.
        Rows are sorted by them and the last row of a time counts.
      channels: names; "0", "1", ... where there are none.
      missing: numbers that mean "not observed".
      problems: counts what was repaired or left out.

    Returns:
      The series, in the order of `arrays`. One with other channels than the first is left out.

    Raises:
      WindowError: there is no series, or an array cannot be read as one.
    """
    problems = Problems() if problems is None else problems
    found: list[Series] = []
    for name, array in _named(arrays):
        values = array if hasattr(array, "shape") else _as_array(name, array)
        if len(values.shape) == 1:
            values = values[:, None]
        own = _times_for(times, name, len(found))
        names = tuple(channels) if channels is not None else _numbered(values.shape)
        if found and len(values.shape) == 2 and values.shape[1] != len(found[0].channels):
            problems.add(Fate.DROPPED, Reason.RAGGED_CHANNELS, where=f"series {name!r}")
            continue
        if own is not None:
            values, own = in_order(values, time_numbers(own), name=name, problems=problems)
        found.append(
            Series(name=name, values=values, channels=names, times=own, missing=tuple(missing))
        )
    if not found:
        raise WindowError(
            f"There is no series to read ({problems}); pass at least one array of shape (n, C)."
        )
    return found


def read_npy(path: str | os.PathLike[str], **options: Any) -> list[Series]:
    """Maps an `.npy` file into memory: rows are read from disk when a window needs them.

    Args:
      path: a file of `(n, C)`, `(n,)` or `(S, n, C)` numbers.
      **options: as of `from_arrays`. `times` may be a `range`; times that are out of order make
        the sorted copy that they need.

    Returns:
      The series, named after the file where it holds one.

    Raises:
      DataError: the file cannot be read as numbers.
      WindowError: as for `from_arrays`.
    """
    path = Path(path)
    array = _mapped(path)
    if array.ndim == 3:
        return from_arrays([_MappedRows(path, i) for i in range(len(array))], **options)
    return from_arrays({path.stem: _MappedRows(path, None)}, **options)


class _MappedRows:
    """`(n, C)` of a memory map; worker processes map the file again instead of being sent it."""

    def __init__(self, path: Path, number: int | None):
        self._path, self._number = path.absolute(), number
        self._open()

    def _open(self) -> None:
        array = _mapped(self._path)
        array = array if self._number is None else array[self._number]
        self._array = array[:, None] if array.ndim == 1 else array
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._array[rows]

    def __len__(self) -> int:
        return len(self._array)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_number": self._number}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as an .npy file of numbers ({error}); write it with numpy.save."
        ) from error


def time_numbers(times: Any) -> np.ndarray | range:
    """Turns dates into int64 nanoseconds since 1970 (NaT stays the lowest int64), else numbers.

    Raises:
      WindowError: the times are neither dates nor numbers.
    """
    if isinstance(times, range):
        if times.step <= 0:
            raise WindowError(f"times is {times!r}, expected an ascending range.")
        return times
    array = np.asarray(times)
    if array.dtype.kind == "M":
        return array.astype("datetime64[ns]").astype(np.int64)
    if array.dtype.kind == "u":
        return array.astype(np.int64)
    if array.dtype.kind not in "if":
        raise WindowError(
            f"Times have dtype {array.dtype}, expected dates (datetime64) or numbers; parse texts "
            "first, for instance with np.array(texts, 'datetime64[ns]')."
        )
    return array


NO_TIME = np.iinfo(np.int64).min


def in_order(
    values: Any,
    times: np.ndarray | range,
    *,
    name: str,
    problems: Problems,
    distinct: bool = True,
) -> tuple[Any, np.ndarray | range]:
    """Sorts rows by time, drops rows without a time, and keeps the last row of each time.

    Equal times keep their order in the source, so "the last" is what the source said last. Without
    `distinct` all of them stay.

    Raises:
      WindowError: the times are no `(n,)` array.
    """
    if isinstance(times, range):
        return values, times
    if times.shape != (len(values),):
        raise WindowError(
            f"Series {name!r} has {len(values)} rows and times of shape {times.shape}, expected "
            "one time for each row."
        )
    known = np.isfinite(times) if times.dtype.kind == "f" else times != NO_TIME
    if known.all() and (times[1:] > times[:-1]).all():
        return values, times
    where = f"series {name!r}"
    problems.add(Fate.DROPPED, Reason.UNREADABLE_TIME, int(np.count_nonzero(~known)), where=where)
    rows = np.flatnonzero(known)
    ahead = np.maximum.accumulate(times[rows]) if len(rows) else times[rows]
    problems.add(
        Fate.REPAIRED, Reason.SHUFFLED_TIMES, int((times[rows] < ahead).sum()), where=where
    )
    rows = rows[np.argsort(times[rows], kind="stable")]
    if not distinct:
        return values[rows], times[rows]
    last = np.append(times[rows][1:] != times[rows][:-1], True)[: len(rows)]
    problems.add(Fate.REPAIRED, Reason.DUPLICATE_TIMES, int((~last).sum()), where=where)
    rows = rows[last]
    return values[rows], times[rows]


def _named(arrays: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(arrays, Mapping):
        yield from ((str(name), array) for name, array in arrays.items())
    elif hasattr(arrays, "shape") and len(arrays.shape) <= 2:
        yield "0", arrays
    elif hasattr(arrays, "shape") and len(arrays.shape) > 3:
        raise WindowError(
            f"The array has shape {tuple(arrays.shape)}, expected (n, C), (n,) or (S, n, C)."
        )
    else:
        yield from ((str(i), array) for i, array in enumerate(arrays))


def _as_array(name: str, array: Any) -> np.ndarray:
    try:
        return np.asarray(array, np.float64)
    except (TypeError, ValueError) as error:
        raise WindowError(
            f"Series {name!r} is not an array of numbers: {error}. Pass (n, C) values; give series "
            "of several lengths as a mapping or a list."
        ) from None


def _times_for(times: Any, name: str, position: int) -> Any:
    if isinstance(times, Mapping):
        if name not in times:
            raise WindowError(f"There are no times for series {name!r}; give one array for each.")
        return times[name]
    if isinstance(times, (list, tuple)) and times and np.ndim(times[0]) == 1:
        if position >= len(times):
            raise WindowError(f"There are times for {len(times)} series, expected more.")
        return times[operator.index(position)]
    return times


def _numbered(shape: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(str(c) for c in range(shape[1] if len(shape) > 1 else 1))

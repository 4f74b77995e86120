"""Tables to series: CSV, Parquet, rows of Hugging Face datasets and other dicts.

    series = read_csv("weather.csv", time="time_hour", series="origin", channels=["temp", "dewp"])
    series = read_parquet("weather.parquet", time="time_hour", series="origin", channels=[...])
    series = read_rows(dataset, time="time_hour", series="origin", channels=[...])
    series = read_series_rows(dataset, values="target", name="item_id", time="start", step=...)

A long table has one row per time; `series` names the column that tells series apart. Rows are
sorted by time and the last row of a time counts. Tables are read whole: for data that memory does
not hold, use `.npy`, Zarr or N5. Cost: about 1 us a cell of CSV; Parquet reads the named columns.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.adapters.options import framework  # pyright: ignore[reportMissingImports]
from metagrad_filter.errors import DataError, WindowError

from .problems import Fate, Problems, Reason
from .resampling import numbers
from .series import NO_TIME, Series, from_arrays, in_order, time_numbers

# What files write for "no value"; compared without case.
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-"})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def read_csv(
    path: str | os.PathLike[str],
    *,
    channels: Sequence[str] | None = None,
    time: str | None = None,
    series: str | None = None,
    missing: Sequence[float] = (),
    delimiter: str = ",",
    problems: Problems | None = None,
) -> list[Series]:
    """Reads a CSV file with a header.

    Args:
      path: the file, UTF-8.
      channels: columns that hold values; None takes all but `time` and `series`.
      time: column of times: numbers, or ISO 8601 dates (UTC where no offset is given).
      series: column that names the series; None reads one, named after the file.
      missing: numbers that mean "not observed"; empty cells, NA, NaN, null and - always do.
      delimiter: between cells.
      problems: counts rows with too few or too many cells, cells that are no numbers, rows without
        a time, out of order or at the time of another.

    Returns:
      The series in the order in which the file names them, values float64.

    Raises:
      DataError: the file cannot be read, has no header or no rows, or lacks a column.
      WindowError: no row is left.
    """
    problems = Problems() if problems is None else problems
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = [cell.strip() for cell in next(reader, [])]
            wanted = _wanted(path.name, header, channels, time, series)
            places = [header.index(column) for column in wanted]
            columns: list[list[str]] = [[] for _ in places]
            ragged = 0
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    ragged += 1
                    row = row + [""] * (len(header) - len(row))
                for column, place in zip(columns, places):
                    column.append(row[place])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as CSV ({error}); expected UTF-8 text with a header."
        ) from error
    problems.add(Fate.REPAIRED, Reason.RAGGED_ROW, ragged, where=path.name)
    table: dict[str, Any] = dict(zip(wanted, columns))
    return _long(table, path.stem, time, series, missing, problems)


def read_parquet(
    path: str | os.PathLike[str],
    *,
    channels: Sequence[str] | None = None,
    time: str | None = None,
    series: str | None = None,
    missing: Sequence[float] = (),
    problems: Problems | None = None,
) -> list[Series]:
    """Reads a Parquet file or a folder of them; as `read_csv`, and needs `pyarrow`.

    Raises:
      ConfigError: `pyarrow` is not installed.
      DataError: the file cannot be read, has no rows, or lacks a column.
      WindowError: no row is left.
    """
    parquet = framework("pyarrow.parquet", "timeseries")
    problems = Problems() if problems is None else problems
    path = Path(path)
    try:
        header = parquet.ParquetDataset(path).schema.names
        wanted = _wanted(path.name, header, channels, time, series)
        read = parquet.read_table(path, columns=wanted)
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
        raise DataError(f"{path} cannot be read as Parquet ({error}).") from error
    table = {name: read[name].to_numpy() for name in wanted}
    return _long(table, path.stem, time, series, missing, problems)


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    channels: Sequence[str] | None = None,
    time: str | None = None,
    series: str | None = None,
    missing: Sequence[float] = (),
    problems: Problems | None = None,
) -> list[Series]:
    """Reads rows that are dicts, one per time: a Hugging Face dataset, or any iterable of dicts.

    Args:
      rows: each with the same keys; a key that a row lacks is a missing value.
      channels: as for `read_csv`; so are the others.
      time: key of times: dates (also as texts) or numbers.
      series: key that names the series; None reads one, named "0".
      missing: numbers that mean "not observed"; None and NaN always do.
      problems: counts what `read_csv` counts.

    Raises:
      DataError: there are no rows, or they lack a key.
      WindowError: no row is left.
    """
    problems = Problems() if problems is None else problems
    columns: dict[str, list[Any]] | None = None
    for row in rows:
        if columns is None:
            columns = {k: [] for k in _wanted("The dataset", list(row), channels, time, series)}
        for key, column in columns.items():
            column.append(row.get(key))
    if columns is None:
        raise DataError("The dataset has no rows; check its split and earlier filters.")
    return _long(columns, "0", time, series, missing, problems)


def read_series_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    values: str,
    name: str | None = None,
    time: str | None = None,
    step: Any = None,
    channels: Sequence[str] | None = None,
    channels_first: bool = False,
    missing: Sequence[float] = (),
    problems: Problems | None = None,
) -> list[Series]:
    """Reads rows that hold a whole series each, as forecasting datasets do.

    Args:
      rows: dicts; a Hugging Face dataset.
      values: key of `(n,)` or `(n, C)` numbers.
      name: key of the series' name; None numbers them.
      time: key of the times, `(n,)`, or with `step` of the first time alone.
      step: distance between times; a `timedelta64` for dates.
      channels: names; "0", "1", ... where there are none.
      channels_first: values are `(C, n)`.
      missing: numbers that mean "not observed"; None and NaN always do.
      problems: counts what was repaired or left out.

    Raises:
      DataError: there are no rows, a key is missing, or values are no numbers.
      WindowError: as for `from_arrays`.
    """
    arrays: dict[str, np.ndarray] = {}
    times: dict[str, Any] = {}
    for position, row in enumerate(rows):
        lacking = [key for key in (values, name, time) if key is not None and key not in row]
        if lacking:
            raise DataError(f"Row {position} lacks {lacking}, available: {sorted(row)}.")
        label = str(position if name is None else row[name])
        if label in arrays:
            raise DataError(f"Row {position} is a second series {label!r}; names must differ.")
        try:
            array = np.array(row[values], np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"Row {position}: {values!r} is no array of numbers: {error}") from None
        arrays[label] = array.T if channels_first else array
        if time is not None:
            times[label] = _axis(row[time], step, len(arrays[label]))
    if not arrays:
        raise DataError("The dataset has no rows; check its split and earlier filters.")
    return from_arrays(
        arrays,
        times=times if time is not None else None,
        channels=channels,
        missing=missing,
        problems=problems,
    )


def parse_times(cells: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Reads times: numbers, `datetime`s or ISO 8601 texts; what is none becomes "no time".

    Returns:
      `(n,)`: int64 nanoseconds since 1970 (UTC where no offset is given) for dates, float64 for
      numbers. The first cell that can be read decides which.
    """
    if isinstance(cells, np.ndarray) and cells.dtype.kind in "Mfiu":
        return np.asarray(time_numbers(cells))
    kinds = (_number_of, _date_of)
    reader = next((k for cell in cells for k in kinds if k(cell) is not None), _number_of)
    found = [reader(cell) for cell in cells]
    if reader is _date_of:
        return np.array([NO_TIME if t is None else t for t in found], np.int64)
    return np.array([np.nan if t is None else t for t in found], np.float64)


def _long(
    table: Mapping[str, Any],
    only: str,
    time: str | None,
    series: str | None,
    missing: Sequence[float],
    problems: Problems,
) -> list[Series]:
    """Splits a table of columns into series."""
    channels = tuple(column for column in table if column not in (time, series))
    count = len(next(iter(table.values())))
    values = np.empty((count, len(channels)))
    for c, channel in enumerate(channels):
        values[:, c] = _column(table[channel], channel, problems)
    times = None if time is None else parse_times(table[time])
    groups: dict[str, list[int]] = {}
    if series is None:
        groups[only] = list(range(count))
    else:
        for row, name in enumerate(table[series]):
            groups.setdefault(str(name), []).append(row)
    found = []
    for name, members in groups.items():
        rows, axis = values[members], None
        if times is not None:
            rows, axis = in_order(rows, times[members], name=name, problems=problems)
        if len(rows):
            found.append(
                Series(
                    name=name, values=rows, channels=channels, times=axis, missing=tuple(missing)
                )
            )
    if not found:
        raise WindowError(f"No row of the table is left ({problems}); pass a table with rows.")
    return found


def _column(cells: Any, channel: str, problems: Problems) -> np.ndarray:
    if len(cells) and isinstance(cells[0], str):
        # Names of missing values are no mistakes of the file.
        cells = [np.nan if c is None or c.strip().lower() in _MISSING else c for c in cells]
    return numbers(cells, where=f"channel {channel!r}", problems=problems)


def _wanted(
    place: str,
    header: Sequence[str],
    channels: Sequence[str] | None,
    time: str | None,
    series: str | None,
) -> list[str]:
    keys = [key for key in (time, series) if key is not None]
    if channels is None:
        channels = [column for column in header if column not in keys]
    wanted = [*keys, *channels]
    lacking = [column for column in wanted if column not in header]
    if lacking or not channels:
        raise DataError(
            f"{place} lacks the columns {lacking or 'that hold values'}, available: "
            f"{list(header)}; name what is there with channels=, time= and series=."
        )
    twice = [column for column in dict.fromkeys(wanted) if list(header).count(column) > 1]
    if twice or len(set(wanted)) != len(wanted):
        raise DataError(
            f"{place} names {twice or wanted} more than once; each column needs a name."
        )
    return wanted


def _axis(cell: Any, step: Any, count: int) -> Any:
    if step is None:
        return parse_times(cell if isinstance(cell, np.ndarray) else list(cell))
    first = parse_times([cell])[0]
    if isinstance(step, np.timedelta64):
        step = int(step.astype("timedelta64[ns]").astype(np.int64))
    return first + np.arange(count) * step


def _number_of(cell: Any) -> float | None:
    if isinstance(cell, (datetime, np.datetime64)) or cell is None:
        return None
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _date_of(cell: Any) -> int | None:
    if isinstance(cell, np.datetime64):
        value = int(cell.astype("datetime64[ns]").astype(np.int64))
        return None if value == NO_TIME else value
    if isinstance(cell, str):
        try:
            cell = datetime.fromisoformat(cell.strip())
        except ValueError:
            return None
    if not isinstance(cell, datetime):
        return None
    cell = cell if cell.tzinfo is not None else cell.replace(tzinfo=UTC)
    since = cell - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000

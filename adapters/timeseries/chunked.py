"""Zarr and N5 through TensorStore: chunks are read as windows need them, never the whole array.

    series = open_store("weather.zarr", axes="stc")      # series x time x channel
    ds = WindowStream(series, Cut(length=256))

Zarr 2 and 3 and N5 are told apart by their files; any other TensorStore spec may be given as it is,
`gs://` and `s3://` among them. Memory: the chunks of two blocks, plus a cache of 16 MiB that serves
chunks which hold the rows of several blocks or series. Lay chunks out along time: a chunk of one
row and all series is read again for every row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.adapters.options import framework  # pyright: ignore[reportMissingImports]
from metagrad_filter.errors import ConfigError, DataError, WindowError

from .series import Series, time_numbers

# The file that tells a format, in the array's folder.
_DRIVERS = {"zarr.json": "zarr3", ".zarray": "zarr", "attributes.json": "n5"}
_AXES = {1: "t", 2: "tc", 3: "stc"}
_CACHE_BYTES = 16 << 20


def open_store(
    place: str | os.PathLike[str] | Mapping[str, Any],
    *,
    axes: str | None = None,
    driver: str | None = None,
    channels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    times: Any = None,
    missing: Sequence[float] = (),
    cache_bytes: int = _CACHE_BYTES,
) -> list[Series]:
    """Opens an array as series; reads its description only.

    Args:
      place: the folder or URL of one array, or a TensorStore spec.
      axes: what each axis is, a letter each in the array's order: "t" time (once), "c" channels and
        "s" series (at most once). None means "t", "tc" or "stc" by the number of axes.
      driver: TensorStore's name of the format; None finds zarr, zarr3 or n5 by the files of a
        folder.
      channels: names; "0", "1", ... where there are none.
      names: of the series along "s"; "0", "1", ... where there are none.
      times: `(n,)` ascending dates or numbers, for all series alike; a `range` takes no memory.
      missing: numbers that mean "not observed", besides NaN; the store's fill value, where chunks
        that were never written must not count.
      cache_bytes: bytes of decoded chunks kept for later reads.

    Returns:
      The series, unread.

    Raises:
      ConfigError: `axes` do not fit, or the format cannot be told.
      DataError: the store cannot be opened; while reading also for damaged chunks.
      WindowError: times do not ascend, or names and values do not fit each other.
    """
    ts = framework("tensorstore", "timeseries", install="pip install tensorstore")
    spec = _spec(place, driver)
    described = str(place) if isinstance(place, (str, os.PathLike)) else str(spec)
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    try:
        store = ts.open(
            {"recheck_cached_data": "open", **spec}, read=True, open=True, context=context
        ).result()
    except (ValueError, OSError, TypeError) as error:
        raise DataError(
            f"{described} cannot be opened as {spec.get('driver')}: {error}. Name the folder of "
            "one array."
        ) from error
    axes = _AXES.get(store.rank) if axes is None else axes
    if axes is None or len(axes) != store.rank or not _fit(axes):
        raise ConfigError(
            f"axes is {axes!r} for an array of shape {store.shape}, expected one letter for each "
            "axis: 't' once, 'c' and 's' at most once."
        )
    rows = int(store.shape[axes.index("t")])
    axis = _ascending(times, rows, described)
    series = []
    many = store.shape[axes.index("s")] if "s" in axes else 1
    labels = [str(i) for i in range(many)] if names is None else list(map(str, names))
    if len(labels) != many:
        raise WindowError(f"{described} holds {many} series, names= names {len(labels)}.")
    for number, label in enumerate(labels):
        values = _StoredRows(store, axes, number, described)
        width = values.shape[1]
        series.append(
            Series(
                name=label,
                values=values,
                channels=tuple(channels) if channels is not None else tuple(map(str, range(width))),
                times=axis,
                missing=tuple(missing),
            )
        )
    return series


class _StoredRows:
    """`(n, C)` of one series of a store; picklable, as the store is."""

    def __init__(self, store: Any, axes: str, number: int, described: str):
        chunk = store.chunk_layout.read_chunk.shape
        self.chunk_rows = max(int(chunk[axes.index("t")] or 1), 1)
        if "s" in axes:
            place = axes.index("s")
            store = store[(slice(None),) * place + (number,)]
            axes = axes.replace("s", "")
        self._turned = axes == "ct"
        self._flat = "c" not in axes
        self._store = store
        self._described = described
        shape = tuple(map(int, store.shape))
        self.shape = (shape[0], 1) if self._flat else shape[::-1] if self._turned else shape
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def ask(self, a: int, b: int) -> Callable[[], np.ndarray]:
        """Begins to read rows `a .. b - 1`; the result waits for them."""
        view = self._store[:, a:b] if self._turned else self._store[a:b]
        future = view.read()

        def wait() -> np.ndarray:
            try:
                rows = future.result()
            except (ValueError, OSError) as error:
                raise DataError(
                    f"Rows {a} to {b - 1} of {self._described} cannot be read ({error}); restore "
                    "the chunk, or cut the series there."
                ) from error
            return rows[:, None] if self._flat else rows.T if self._turned else rows

        return wait

    def __getitem__(self, rows: slice) -> np.ndarray:
        a, b, step = rows.indices(self.shape[0])
        return self.ask(a, max(a, b))()[::step]

    def __len__(self) -> int:
        return self.shape[0]


def _spec(place: str | os.PathLike[str] | Mapping[str, Any], driver: str | None) -> dict[str, Any]:
    if isinstance(place, Mapping):
        return dict(place)
    place = os.fspath(place)
    if "://" in place:
        if driver is None:
            raise ConfigError(
                f"The format of {place} is not named; give driver= as 'zarr', 'zarr3' or 'n5'."
            )
        return {"driver": driver, "kvstore": place}
    folder = Path(place).absolute()
    if driver is None:
        driver = next((d for file, d in _DRIVERS.items() if (folder / file).is_file()), None)
    if driver is None:
        inside = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no folder"
        raise DataError(
            f"{folder} is no Zarr or N5 array ({inside}), expected one of the files "
            f"{list(_DRIVERS)}; of a group name the array's own folder."
        )
    return {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/"}}


def _fit(axes: str) -> bool:
    return axes.count("t") == 1 and set(axes) <= set("tcs") and len(set(axes)) == len(axes)


def _ascending(times: Any, rows: int, described: str) -> np.ndarray | range | None:
    if times is None:
        return None
    axis = time_numbers(times)
    if len(axis) != rows:
        raise WindowError(f"{described} has {rows} rows and {len(axis)} times, expected as many.")
    if not isinstance(axis, range) and not (axis[1:] > axis[:-1]).all():
        raise WindowError(
            f"The times of {described} do not ascend; a store cannot be sorted while it is "
            "streamed, so write it in the order of time."
        )
    return axis

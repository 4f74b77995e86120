"""Time series adapter: multivariate series of any source become windows that can be ranked.

    from metagrad_filter.adapters import timeseries as ts

    series = ts.read_csv("weather.csv", time="time_hour", series="origin")
    parts = ts.split_by_time(series, {"train": 0.8, "target": 0.2}, gap=24)
    scaling = ts.fit_scaling(parts["train"])
    ds = ts.WindowSource(parts["train"], ts.Cut(length=24), scaling=scaling).dataset()
    ds = mgf.score_filter(ds, "run", keep_ratio=0.25, windows=ts.WINDOWS)

Sources: `from_arrays` (NumPy), `read_npy` (memory-mapped), `read_csv`, `read_parquet`, `read_rows`
and `read_series_rows` (Hugging Face datasets, dicts), `from_events` (timestamp, channel, value),
and `open_store` (Zarr 2 and 3, N5: chunks are streamed through TensorStore).

A window is `(T, C)` float32 with NaN for what is missing, a mask, and where it comes from: series,
row, time. What is odd in a source is dropped, repaired or passed on under a typed reason and
counted (`Problems`), never silently. No JAX import of its own; TensorStore and pyarrow are
imported where they are used. Read next: `series.py`, then `windows.py`.
"""

from .chunked import open_store
from .cutting import Cut
from .problems import Fate, Problems, Reason
from .resampling import from_events, resample
from .scaling import Scaling, fit_scaling
from .series import Series, from_arrays, read_npy
from .splits import split_by_series, split_by_time
from .tables import parse_times, read_csv, read_parquet, read_rows, read_series_rows
from .windows import WINDOWS, Dropped, WindowSource, WindowStream

__all__ = [
    "WINDOWS",
    "Cut",
    "Dropped",
    "Fate",
    "Problems",
    "Reason",
    "Scaling",
    "Series",
    "WindowSource",
    "WindowStream",
    "fit_scaling",
    "from_arrays",
    "from_events",
    "open_store",
    "parse_times",
    "read_csv",
    "read_npy",
    "read_parquet",
    "read_rows",
    "read_series_rows",
    "resample",
    "split_by_series",
    "split_by_time",
]

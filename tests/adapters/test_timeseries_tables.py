"""Parquet files and Hugging Face datasets become the series that the CSV file holds."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metagrad_filter as mgf
from metagrad_filter.errors import DataError, WindowError

datasets: Any = pytest.importorskip("datasets")
pa: Any = pytest.importorskip("pyarrow")
csv: Any = pytest.importorskip("pyarrow.csv")
pq: Any = pytest.importorskip("pyarrow.parquet")
ts = importlib.import_module("metagrad_filter.adapters.timeseries")

WEATHER = Path(__file__).parent.parent / "data" / "weather.csv"
KEYS = {"time": "time_hour", "series": "origin"}


def weather():
    convert = csv.ConvertOptions(null_values=["NA"])
    return csv.read_csv(WEATHER, convert_options=convert)


def same(found, expected):
    assert [one.name for one in found] == [one.name for one in expected]
    for one, other in zip(found, expected):
        assert one.channels == other.channels
        np.testing.assert_array_equal(one.times, other.times)
        np.testing.assert_array_equal(one.read(0, len(one)), other.read(0, len(other)))


@pytest.fixture(scope="module")
def expected():
    return ts.read_csv(WEATHER, **KEYS)


def test_parquet_holds_what_the_csv_file_holds(tmp_path, expected):
    table = weather()
    assert pa.types.is_timestamp(table.schema.field("time_hour").type)
    pq.write_table(table, tmp_path / "weather.parquet", row_group_size=100)
    same(ts.read_parquet(tmp_path / "weather.parquet", **KEYS), expected)
    pq.write_to_dataset(table, tmp_path / "folder", basename_template="part-{i}.parquet")
    same(ts.read_parquet(tmp_path / "folder", **KEYS), expected)
    (one,) = ts.read_parquet(tmp_path / "weather.parquet", channels=["precip"])
    assert (one.name, one.channels, len(one)) == ("weather", ("precip",), 1362)


def test_a_parquet_file_that_cannot_be_used_says_why(tmp_path):
    (tmp_path / "text.parquet").write_text("x,y")
    for path in (tmp_path / "text.parquet", tmp_path / "nowhere.parquet"):
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            ts.read_parquet(path)
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"lacks the columns \['t'\]"):
        ts.read_parquet(tmp_path / "x.parquet", time="t")
    pq.write_table(pa.table({"x": pa.array([], pa.float32())}), tmp_path / "none.parquet")
    with pytest.raises(WindowError, match="No row of the table is left"):
        ts.read_parquet(tmp_path / "none.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_dataset_hold_what_the_csv_file_holds(expected, streaming):
    dataset = datasets.Dataset(weather())
    if streaming:
        dataset = dataset.to_iterable_dataset(num_shards=2)
    same(ts.read_rows(dataset, **KEYS), expected)


def test_rows_that_hold_a_series_each_reach_the_filter(tmp_path, expected):
    rows = [
        {"item_id": one.name, "start": "2013-02-10T00:00", "target": one.read(0, len(one)).tolist()}
        for one in ts.resample(expected, step=np.timedelta64(1, "h"))
    ]
    dataset = datasets.Dataset.from_list(rows)
    series = ts.read_series_rows(
        dataset, values="target", name="item_id", time="start", step=np.timedelta64(1, "h")
    )
    assert [len(one) for one in series] == [456] * 3
    for one, row in zip(series, rows):
        np.testing.assert_array_equal(one.read(0, 456), np.array(row["target"], float))
    source = ts.WindowSource(series, ts.Cut(length=24))
    ds = mgf.score_filter(
        source.dataset(), tmp_path, keep_ratio=0.5, windows=ts.WINDOWS, block_windows=16
    )
    kept = list(ds)
    assert len(kept) == len(source) // 2 and {e["series"] for e in kept} == {"EWR", "JFK", "LGA"}

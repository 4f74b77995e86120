"""Zarr and N5: every layout gives the same windows, read chunk by chunk in bounded memory."""

import importlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorstore

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, DataError, WindowError
from metagrad_filter.scorer.fit_series import fit_series

ts = importlib.import_module("metagrad_filter.adapters.timeseries")

FORMATS = {
    "zarr": lambda chunks: {"metadata": {"chunks": chunks}},
    "zarr3": lambda chunks: {
        "metadata": {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "codecs": [{"name": "gzip", "configuration": {"level": 1}}],
        }
    },
    "n5": lambda chunks: {"metadata": {"blockSize": chunks, "compression": {"type": "gzip"}}},
}


def store(folder, values, driver="zarr", chunks=None):
    """Writes an array and returns its folder."""
    spec = {
        "driver": driver,
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        **FORMATS[driver](list(chunks or values.shape)),
    }
    tensorstore.open(spec, create=True, dtype=values.dtype, shape=values.shape).result().write(
        values
    ).result()
    return folder


def walk(series=3, rows=130, channels=2, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(series, rows, channels)).cumsum(axis=1).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    return values


@pytest.mark.parametrize("driver", FORMATS)
@pytest.mark.parametrize(
    ("axes", "chunks"),
    [("stc", (1, 40, 2)), ("cts", (1, 17, 3)), ("tsc", (16, 2, 1)), ("tc", (50, 1)), ("ct", (2, 7)),
     ("t", (64,)), ("st", (3, 20))],
)  # fmt: skip
def test_every_format_and_layout_gives_the_windows_of_the_array(tmp_path, driver, axes, chunks):
    values = walk()
    if "s" not in axes:
        values = values[:1]
    if "c" not in axes:
        values = values[..., :1]
    stored = np.einsum("stc->" + axes, values) if len(axes) == 3 else None
    if stored is None:
        squeezed = values[0] if "s" not in axes else values
        squeezed = squeezed[..., 0] if "c" not in axes else squeezed
        stored = squeezed.T if axes == "ct" else squeezed
    place = store(tmp_path / "store", np.ascontiguousarray(stored), driver, chunks)
    series = ts.open_store(place, axes=axes, times=range(0, 1300, 10))
    assert len(series) == len(values)
    cut = ts.Cut(length=8, stride=5)
    expected = list(ts.WindowStream(ts.from_arrays(values, times=range(0, 1300, 10)), cut))
    for block_rows in (None, 9, 40):
        found = list(ts.WindowStream(series, cut, block_rows=block_rows))
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert one.keys() == other.keys()
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])
    source = pickle.loads(pickle.dumps(ts.WindowSource(series, cut)))
    np.testing.assert_array_equal(source[7]["values"], expected[7]["values"])


def test_names_channels_and_numbers_for_missing(tmp_path):
    values = np.arange(60, dtype=np.int16).reshape(2, 10, 3)
    place = store(tmp_path / "a", values, "n5", (1, 4, 3))
    first, second = ts.open_store(place, names=["x", "y"], channels="abc", missing=[31, 99])
    assert (first.name, second.name, second.channels) == ("x", "y", ("a", "b", "c"))
    rows = second.read(0, 2)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [[30, np.nan, 32], [33, 34, 35]])
    part = second.part(2, 9)
    (window,) = ts.WindowStream([part], ts.Cut(length=5))
    assert window["start"] == 2 and window["values"][0, 0] == 36
    scaling = ts.fit_scaling([first])
    np.testing.assert_allclose(scaling.center, values[0].mean(axis=0))


def test_chunks_that_were_never_written_are_the_fill_value(tmp_path):
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"},
        "metadata": {"chunks": [10, 1], "fill_value": "NaN", "dtype": "<f4", "shape": [40, 1]},
    }
    opened = tensorstore.open(spec, create=True).result()
    opened[:10].write(np.ones((10, 1), np.float32)).result()
    problems = ts.Problems()
    stream = ts.WindowStream(ts.open_store(tmp_path / "a"), ts.Cut(length=10), problems=problems)
    assert [int(e["start"]) for e in stream] == [0]
    assert problems.counts() == {"dropped": {"not_observed": 3}, "noted": {"constant_channel": 1}}


def test_a_damaged_chunk_says_where_it_is(tmp_path):
    place = store(tmp_path / "a", walk()[0], "zarr", (50, 2))
    (place / "1.0").write_bytes(b"no chunk")
    (one,) = ts.open_store(place)
    assert one.read(0, 50).shape == (50, 2)
    with pytest.raises(DataError, match=rf"Rows \d+ to \d+ of {place} cannot be read"):
        list(ts.WindowStream([one], ts.Cut(length=10), block_rows=50))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axes": "tt"}, ConfigError, "axes is 'tt'"),
        ({"axes": "tcs"}, ConfigError, "axes is 'tcs'"),
        ({"axes": "sc"}, ConfigError, "'t' once"),
        ({"axes": "xt"}, ConfigError, "axes is 'xt'"),
        ({"names": ["a", "b"]}, WindowError, "holds 1 series, names= names 2"),
        ({"channels": ["a"]}, WindowError, "2 channels and 1 names"),
        ({"times": range(5)}, WindowError, "130 rows and 5 times"),
        ({"times": np.zeros(130)}, WindowError, "do not ascend"),
        ({"driver": "n5"}, DataError, "cannot be opened as n5"),
        ({"driver": "rust"}, DataError, "cannot be opened as rust"),
    ],
)
def test_what_does_not_fit_a_store_is_refused(tmp_path, options, error, message):
    place = store(tmp_path / "a", walk()[0])
    with pytest.raises(error, match=message):
        ts.open_store(place, **options)


def test_places_without_an_array_say_so(tmp_path):
    store(tmp_path / "group" / "array", walk()[0])
    for place in (tmp_path / "group", tmp_path / "nowhere"):
        with pytest.raises(DataError, match="is no Zarr or N5 array"):
            ts.open_store(place)
    with pytest.raises(ConfigError, match="give driver="):
        ts.open_store("gs://bucket/array")
    np.testing.assert_array_equal(
        ts.open_store(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{tmp_path}/group/array/"},
            }
        )[0].read(0, 130),
        walk()[0],
    )


PROGRAM = """
import json, sys
import numpy as np
from metagrad_filter.adapters import timeseries as ts

def peak():
    # Unlike ru_maxrss, which a child inherits, this is the process's own.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

series = ts.open_store(sys.argv[1], cache_bytes=1 << 20)
cut = ts.Cut(length=64)
for element in ts.WindowStream([series[0].part(0, 4096)], cut, block_rows=2048):
    pass
before, count, total = peak(), 0, 0.0
for element in ts.WindowStream(series, cut, block_rows=2048):
    count += 1
    total += float(element["values"][0, 0])
print(json.dumps([before, peak(), count, total]))
"""


def test_a_store_larger_than_the_memory_it_takes_is_streamed(tmp_path):
    values = np.repeat(np.arange(1 << 20, dtype=np.float32)[:, None], 16, axis=1)
    place = store(tmp_path / "a", values, "zarr", (2048, 16))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place)], capture_output=True, text=True, check=True
    )
    before, after, count, total = json.loads(run.stdout)
    assert count == (1 << 20) // 64 and total == values[::64, 0].astype(float).sum()
    # The array has 64 MiB; blocks of 128 KiB and some chunks of the same size are read ahead.
    assert after - before < 24


def test_a_filtered_store_resumes_where_it_was(tmp_path):
    place = store(tmp_path / "store", walk(rows=900), "zarr3", (1, 100, 2))
    series = ts.open_store(place)
    windows = ts.WINDOWS.stack(list(ts.WindowStream(series, ts.Cut(length=16, stride=4))))
    worth = np.nanstd(windows, axis=(1, 2))
    mgf.Registry(tmp_path / "run").publish(fit_series(windows, worth, deeper=False))
    ds = mgf.score_filter(
        ts.WindowStream(series, ts.Cut(length=16, stride=4)),
        tmp_path / "run",
        keep_ratio=0.25,
        windows=ts.WINDOWS,
        block_windows=40,
    )
    stream = ts.WindowStream(series, ts.Cut(length=16, stride=4))
    for taken in (0, 1, len(windows) // 3, len(windows) - 1, len(windows)):  # ends of series too
        iterator = iter(stream)
        for _ in range(taken):
            next(iterator)
        resumed = iter(stream)
        resumed.set_state(iterator.get_state())
        assert len(list(resumed)) == len(windows) - taken
    iterator = iter(ds)
    for _ in range(23):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [(e["series"], int(e["start"])) for e in iterator]
    resumed = iter(ds)
    resumed.set_state(state)
    assert [(e["series"], int(e["start"])) for e in resumed] == rest
    assert len(rest) + 23 == len(windows) // 4

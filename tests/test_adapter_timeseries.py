"""Time series become windows: sources, splits that leak nothing, and reasons for what is odd."""

import ast
import gc
import importlib
import itertools
import json
import math
import pickle
from datetime import datetime
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, DataError, StateMismatch, WindowError
from metagrad_filter.monitor.view import run_view
from metagrad_filter.scorer.fit_series import fit_series

ts = importlib.import_module("metagrad_filter.adapters.timeseries")
judge, longest_run = ts.cutting.judge, ts.cutting.longest_run

WEATHER = Path(__file__).parent / "data" / "weather.csv"
CHANNELS = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
HOUR = np.timedelta64(1, "h")
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def walk(rows=100, channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, channels)).cumsum(axis=0)


def some_series(lengths=(50, 33, 7), channels=2, **options):
    return ts.from_arrays([walk(n, channels, seed) for seed, n in enumerate(lengths)], **options)


def weather(problems=None):
    series = ts.read_csv(WEATHER, time="time_hour", series="origin", problems=problems)
    return ts.resample(series, step=HOUR)


# Cutting: each window is the rows that its metadata names.


@st.composite
def any_series(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels = draw(st.integers(1, 3))
    arrays = []
    for _ in range(draw(st.integers(1, 3))):
        rows = rng.normal(size=(draw(st.integers(0, 60)), channels))
        rows[rng.random(rows.shape) < draw(st.sampled_from([0, 0.2, 0.9]))] = np.nan
        arrays.append(rows.astype(draw(st.sampled_from([np.float32, np.float64]))))
    return arrays


@given(
    any_series(),
    st.integers(2, 9),
    st.integers(1, 13),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5]),
)
def test_source_and_stream_give_the_same_windows_and_count_the_rest(
    arrays, length, stride, block, least
):
    cut = ts.Cut(length=length, stride=stride, min_observed=least)
    series = ts.from_arrays(arrays)
    expected, dropped = [], []
    for number, rows in enumerate(arrays):
        for start in range(0, len(rows) - length + 1, stride):
            window = rows[start : start + length]
            observed = np.isfinite(window).mean()
            good = observed >= least and observed > 0
            (expected if good else dropped).append((str(number), start, window))
    problems = ts.Problems()
    stream = ts.WindowStream(series, cut, problems=problems, block_rows=block)
    found = list(stream)
    assert [(e["series"], e["start"]) for e in found] == [e[:2] for e in expected]
    for element, (_, _, window) in zip(found, expected):
        assert element["values"].dtype == np.float32 and element["mask"].dtype == bool
        np.testing.assert_array_equal(element["values"], window.astype(np.float32))
        np.testing.assert_array_equal(element["mask"], np.isfinite(window))
    assert problems.count("not_observed") == len(dropped)
    assert problems.count("too_short") == sum(len(rows) < length for rows in arrays)
    if not expected:
        with pytest.raises(WindowError, match="hold no window"):
            ts.WindowSource(series, cut)
        return
    source = ts.WindowSource(series, cut)
    assert [(d.series, d.start) for d in source.dropped] == [d[:2] for d in dropped]
    assert {d.reason for d in source.dropped} <= {ts.Reason.NOT_OBSERVED}
    for i in range(-len(source), len(source)):
        for key, value in found[i].items():
            np.testing.assert_array_equal(source[i][key], value)
    assert len(ts.WindowSource(series, cut, inspect=False)) == len(expected) + len(dropped)


@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 12))
def test_a_stream_resumes_at_every_window(taken, block, stride):
    series = some_series((60, 3, 41))
    stream = ts.WindowStream(series, ts.Cut(length=6, stride=stride), block_rows=block)
    iterator = iter(stream)
    for _ in zip(range(taken), iterator):
        pass
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [(e["series"], int(e["start"])) for e in iterator]
    resumed = iter(stream)
    resumed.set_state(state)
    assert [(e["series"], int(e["start"])) for e in resumed] == rest


def test_a_state_of_another_source_is_refused():
    stream = ts.WindowStream(some_series(), ts.Cut(length=6))
    state = iter(stream).get_state()
    other = ts.WindowStream(some_series((50, 33)), ts.Cut(length=6))
    for wrong, message in ((state, '\'|"rows": 90|source'), ({"row": 1}, "another pipeline")):
        with pytest.raises(StateMismatch, match=message):
            iter(other).set_state(wrong)


def test_indices_outside_are_refused_and_elements_travel():
    source = pickle.loads(pickle.dumps(ts.WindowSource(some_series(), ts.Cut(length=5))))
    assert len(source) == 10 + 6 + 1 and source[16]["series"] == "2"
    with pytest.raises(IndexError):
        source[17]
    batch = next(iter(source.dataset().shuffle(seed=1).batch(4)))
    assert batch["values"].shape == (4, 5, 2) and batch["series"].shape == (4,)
    stacked = source.stacked()
    assert stacked["values"].shape == (17, 5, 2) and stacked["start"].tolist()[:3] == [0, 5, 10]


# Reasons.


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**32))
def test_the_longest_run_is_the_longest(count, length, seed):
    true = np.random.default_rng(seed).random((count, length)) < 0.6
    expected = []
    for row in true:
        texts = "".join("x" if value else " " for value in row).split()
        expected.append(max(map(len, texts), default=0))
    assert longest_run(true).tolist() == expected


def odd_windows():
    windows = np.random.default_rng(0).normal(size=(7, 10, 3)).astype(np.float32)
    windows[1] = np.nan  # nothing observed
    windows[2, 2:6] = np.nan  # a block of four steps
    windows[3, :, 1] = np.nan  # a missing channel
    windows[4, :, 2] = 7  # a constant channel
    windows[5, :, 0] = np.inf  # counts as missing
    windows[6, 2:, 1] = np.nan
    windows[6, :2, 1] = 3  # constant as far as it is seen
    return windows


def test_each_window_has_its_reason():
    reasons = ["", "not_observed", "", "", "", "", ""]
    assert names(judge(odd_windows(), ts.Cut(length=10))[0]) == reasons
    noted = judge(odd_windows(), ts.Cut(length=10))[1]
    assert noted == {ts.Reason.MISSING_CHANNEL: 2, ts.Reason.CONSTANT_CHANNEL: 2}
    strict = ts.Cut(length=10, max_missing_run=3, missing_channel="drop", constant_channel="drop")
    codes, noted = judge(odd_windows(), strict, gaps=np.arange(7) == 0)
    assert names(codes) == [
        "time_gap", "not_observed", "missing_run", "missing_channel", "constant_channel",
        "missing_channel", "constant_channel",
    ]  # fmt: skip
    assert noted == {}
    assert names(judge(odd_windows(), ts.Cut(length=10, min_observed=0.9))[0])[2] == "not_observed"


def names(codes):
    return ["" if code == 0 else ts.cutting.REASONS[code - 1].value for code in codes]


def test_odd_sources_never_give_a_score_that_is_nan():
    """The bad input of a real run: each is repaired or dropped under its reason, and counted."""
    rng = np.random.default_rng(1)
    hours = np.arange("2020-01-01", "2020-02-01", dtype="datetime64[h]")
    rows = walk(len(hours), 3)
    rows[:, 1] = 5  # a constant channel
    rows[102:202] = np.nan  # a block of NaN
    rows[300:330, 2] = np.nan  # a missing channel
    rows[400, 0] = np.inf
    order = rng.permutation(len(hours))
    order = np.append(order, order[:9])  # shuffled and duplicated timestamps
    problems = ts.Problems()
    arrays = {
        "odd": rows[order],
        "ragged": rows[:50, :2],
        "short": rows[:5],
        "no times": rows[:60],
    }
    times = {name: hours[: len(a)] for name, a in arrays.items()} | {"odd": hours[order]}
    times["no times"] = np.array(["NaT"] * 50, "datetime64[ns]").tolist() + hours[:10].tolist()
    times["no times"] = np.array(times["no times"], "datetime64[h]")
    series = ts.from_arrays(arrays, times=times, problems=problems)
    cut = ts.Cut(length=12, stride=6, max_missing_run=4)
    scaling = ts.fit_scaling(series)
    ds = ts.WindowStream(series, cut, scaling=scaling, problems=problems)
    elements = list(ds)
    assert all(e["series"] == "odd" for e in elements)
    assert [e["start"] for e in elements] == sorted(e["start"] for e in elements)
    counts = problems.counts()
    assert counts["repaired"]["duplicate_times"] == 9
    assert 600 < counts["repaired"]["shuffled_times"] <= len(order)
    assert counts["repaired"]["non_finite"] == 1
    assert counts["dropped"] == {
        "missing_run": 1,
        "not_observed": 16,
        "ragged_channels": 1,
        "too_short": 2,
        "unreadable_time": 50,
    }
    assert counts["noted"]["constant_channel"] == len(elements)
    assert counts["noted"]["missing_channel"] == 4
    scorer = fit_series(ts.WINDOWS.stack(elements), rng.normal(size=len(elements)), deeper=False)
    assert np.isfinite(scorer.score(ts.WINDOWS.stack(elements))).all()
    json.dumps(counts)
    assert "ragged_channels 1" in str(problems) and problems
    assert problems.places()[ts.Fate.DROPPED, ts.Reason.TOO_SHORT][0] == "series 'short' of 5 rows"
    assert str(ts.Problems()) == "nothing odd" and not ts.Problems()


def test_windows_over_a_gap_in_time_are_dropped():
    times = np.r_[np.arange(20), np.arange(25, 40)]
    series = ts.from_arrays(walk(35), times=times)
    source = ts.WindowSource(series, ts.Cut(length=5, stride=1, max_gap=1))
    assert [d.start for d in source.dropped] == [16, 17, 18, 19]
    assert {d.reason for d in source.dropped} == {ts.Reason.TIME_GAP}
    assert source[16]["time"] == 25


# In which units.


@pytest.mark.parametrize("per_series", [False, True])
def test_scaling_is_the_mean_and_deviation_of_what_was_observed(per_series):
    arrays = [walk(5000, 3, seed) * 10**seed + 1e4 for seed in (0, 1)]
    arrays[0][::7, 1] = np.nan
    series = ts.from_arrays(arrays)
    scaling = ts.fit_scaling(series, per_series=per_series)
    for one, rows in zip(series, arrays):
        expected = rows if per_series else np.concatenate(arrays)
        scaled = scaling.apply(rows, one.name)
        center, scale = np.nanmean(expected, axis=0), np.nanstd(expected, axis=0)
        np.testing.assert_allclose(scaled, (rows - center) / scale, atol=1e-5)
        np.testing.assert_allclose(scaling.undo(scaled, one.name), rows, rtol=1e-6)
    assert scaling.apply(arrays[0], "unseen").dtype == np.float32
    assert ts.Scaling.from_dict(json.loads(json.dumps(scaling.as_dict()))) == scaling


@given(st.integers(0, 2**32))
def test_scaling_in_stretches_equals_scaling_at_once(seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(300, 2)) * [1, 1e3] + [1e6, -3]
    edges = np.sort(rng.integers(0, 300, 4))
    whole = ts.from_arrays(rows)[0]
    pieces = [whole.part(int(a), int(b)) for a, b in zip([0, *edges], [*edges, 300])]
    once, merged = ts.fit_scaling([whole]), ts.fit_scaling(pieces)
    np.testing.assert_allclose(merged.center, once.center, rtol=1e-12)
    np.testing.assert_allclose(merged.scale, once.scale, rtol=1e-9)


def test_robust_scaling_is_not_moved_by_broken_values():
    rows = np.random.default_rng(0).normal(size=(4000, 1)) * 3 + 10
    rows[:40] = 1e6
    robust = ts.fit_scaling(ts.from_arrays(rows), method="robust")
    assert abs(robust.center[0] - 10) < 0.3 and abs(robust.scale[0] - 3) < 0.2
    assert ts.fit_scaling(ts.from_arrays(rows)).scale[0] > 1e4


def test_channels_that_never_change_are_left_in_their_unit():
    rows = np.stack([np.full(50, 0.1), np.full(50, np.nan), np.r_[np.zeros(45), np.ones(5)]], 1)
    for method in ("standard", "robust"):
        scaling = ts.fit_scaling(ts.from_arrays(rows), method=method)
        assert scaling.scale[:2] == (1.0, 1.0) and scaling.center[1] == 0
        assert 0.2 < scaling.scale[2] < 0.4
        assert np.isfinite(scaling.apply(rows, "0")[:, [0, 2]]).all()


def test_what_comes_after_the_cut_changes_nothing_before_it():
    past = walk(200)
    worlds = [np.concatenate([past, 1e3 * walk(100, seed=seed)]) for seed in (1, 2)]
    found = []
    for rows in worlds:
        series = ts.from_arrays({"a": rows}, times=np.arange(300))
        parts = ts.split_by_time(series, {"train": 0.5, "report": 0.5}, gap=10, cuts=[200])
        scaling = ts.fit_scaling(parts["train"])
        source = ts.WindowSource(parts["train"], ts.Cut(length=10), scaling=scaling)
        found.append((scaling, source.stacked()))
    assert found[0][0] == found[1][0]
    for key, values in found[0][1].items():
        np.testing.assert_array_equal(values, found[1][1][key])


# Splits.


@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(2, 4))
def test_each_series_is_in_one_part(count, seed, parts):
    shares = {f"part {i}": 1 / parts for i in range(parts)}
    series = some_series((9,) * count)
    series += [one.part(0, 4) for one in series[:3]]  # stretches stay with their series
    if count < parts:
        with pytest.raises(WindowError, match="split by time"):
            ts.split_by_series(series, shares, seed=seed)
        return
    split = ts.split_by_series(series, shares, seed=seed)
    members = [{one.name for one in part} for part in split.values()]
    assert all(members) and sum(map(len, members)) == count == len(set().union(*members))
    assert sum(map(len, split.values())) == len(series)
    assert max(map(len, members)) - min(map(len, members)) <= 1
    again = ts.split_by_series(series, shares, seed=seed)
    assert {k: [o.name for o in v] for k, v in split.items()} == {
        k: [o.name for o in v] for k, v in again.items()
    }


@given(st.integers(0, 30), st.integers(2, 8), st.booleans())
def test_no_window_of_a_later_part_touches_an_earlier_one(gap, length, by_time):
    series = some_series((90, 61), times=None)
    if by_time:
        arrays = [one.read(0, len(one)) for one in series]
        series = ts.from_arrays(arrays, times=[np.arange(len(a)) * 2 for a in arrays])
    shares = {"train": 0.6, "gate": 0.2, "report": 0.2}
    try:
        parts = ts.split_by_time(series, shares, gap=gap, cuts=[55, 90] if by_time else None)
        sources = [
            ts.WindowSource(part, ts.Cut(length=length, stride=1)) for part in parts.values()
        ]
    except WindowError:
        return
    for name in ("0", "1"):
        rows = [
            [int(s[i]["start"]) for i in range(len(s)) if s[i]["series"] == name] for s in sources
        ]
        for earlier, later in itertools.pairwise(rows):
            if earlier and later:
                assert min(later) >= max(earlier) + length + gap


def test_wrong_splits_say_what_is_wrong():
    series = some_series((50, 40))
    for wrong, message in (
        ({"a": 0.5, "b": 0.4}, "sum to 0.9"),
        ({"a": 1.5, "b": -0.5}, r"expected a share in \(0, 1\]"),
        ({}, "expected a share"),
    ):
        with pytest.raises(ConfigError, match=message):
            ts.split_by_series(series, wrong)
    half = {"a": 0.5, "b": 0.5}
    for options, error, message in (
        ({"gap": -1}, ConfigError, "gap is -1"),
        ({"gap": 1, "cuts": [1, 2]}, ConfigError, "expected 1 ascending times"),
        ({"gap": 1, "cuts": [1]}, WindowError, "has no times to cut at"),
        ({"gap": 60}, WindowError, "No series reaches into the part 'b'"),
    ):
        with pytest.raises(error, match=message):
            ts.split_by_time(series, half, **options)


# Irregular times and events.


def test_resampling_takes_the_last_or_the_mean_and_carries_no_further_than_asked():
    times = np.array([0.5, 0.9, 1.5, 4.2])
    rows = np.array([[1, np.nan], [2, 8], [4, np.nan], [9, 9]], float)
    series = ts.from_arrays(rows, times=times)
    nan = np.nan

    def resampled(**options):
        one = ts.resample(series, step=1.0, **options)[0]
        assert np.asarray(one.times).tolist() == [0, 1, 2, 3, 4]
        return one.read(0, 5).T.tolist()

    def same(found, expected):
        np.testing.assert_array_equal(np.array(found), np.array(expected))

    same(resampled(), [[2, 4, nan, nan, 9], [8, nan, nan, nan, 9]])
    same(resampled(how="mean"), [[1.5, 4, nan, nan, 9], [8, nan, nan, nan, 9]])
    same(resampled(carry=1), [[2, 4, 4, nan, 9], [8, 8, nan, nan, 9]])
    same(resampled(carry=9), [[2, 4, 4, 4, 9], [8, 8, 8, 8, 9]])


@given(st.integers(0, 2**32), st.sampled_from(["last", "mean"]), st.integers(0, 3))
def test_later_readings_change_no_earlier_step(seed, how, carry):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, 20, 40))
    rows = rng.normal(size=(40, 2))
    full = ts.resample(ts.from_arrays(rows, times=times), step=1.5, how=how, carry=carry)[0]
    early = times < 10.5  # a multiple of the step
    past = ts.resample(
        ts.from_arrays(rows[early], times=times[early]), step=1.5, how=how, carry=carry
    )[0]
    np.testing.assert_array_equal(past.read(0, len(past)), full.read(0, len(past)))


def test_dates_share_one_grid():
    days = np.array(["2020-01-01T03", "2020-01-01T16", "2020-01-03T01"], "datetime64[h]")
    one = ts.resample(ts.from_arrays(np.arange(3.0), times=days), step=np.timedelta64(12, "h"))[0]
    assert one.times == range(
        int(np.datetime64("2020-01-01", "ns").astype(int)),
        int(np.datetime64("2020-01-03T12", "ns").astype(int)),
        12 * 3600 * 10**9,
    )
    np.testing.assert_array_equal(one.read(0, 5)[:, 0], [0, 1, np.nan, np.nan, 2])


def test_events_become_a_series_and_odd_ones_are_counted():
    events = [
        (3.0, "a", 3), (0.2, "a", 1), (0.7, "b", 5), (0.7, "a", "broken"), (0.9, "a", 2),
        (1.1, "c", 1), (math.nan, "a", 4), (2.5, "b", None), (2.5, "b", 7),
    ]  # fmt: skip
    problems = ts.Problems()
    one = ts.from_events(events, channels=["a", "b"], step=1, name="ward", problems=problems)
    np.testing.assert_array_equal(
        one.read(0, 4), [[2, 5], [np.nan, np.nan], [np.nan, 7], [3, np.nan]]
    )
    assert problems.counts() == {
        "dropped": {"unknown_channel": 1, "unreadable_time": 1},
        "repaired": {"shuffled_times": 6, "unreadable_value": 1},
    }
    arrays = (np.array([0.2, 0.9, 1.5]), np.array(["a", "a", "b"]), np.array([1.0, 3, 5]))
    mean = ts.from_events(arrays, channels=["a", "b"], step=1.0, how="mean")
    np.testing.assert_array_equal(mean.read(0, 2), [[2, np.nan], [np.nan, 5]])
    for wrong, message in (
        ({"events": []}, "No event"),
        ({"events": [(1, 2)]}, "three entries"),
        ({"events": [(0, "a", 1), (1e15, "a", 1)]}, "look for a wrong time"),
    ):
        with pytest.raises(WindowError, match=message):
            ts.from_events(**({"channels": ["a"], "step": 1.0} | wrong))


@pytest.mark.parametrize(
    "wrong", [{"step": 0}, {"step": math.nan}, {"how": "median"}, {"carry": -1}, {"step": True}]
)
def test_wrong_resampling_is_refused(wrong):
    series = ts.from_arrays(walk(5), times=np.arange(5.0))
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}"):
        ts.resample(series, **({"step": 1.0} | wrong))
    with pytest.raises(WindowError, match="has no times"):
        ts.resample(some_series(), step=1.0)


# Files.


def test_weather_is_read_as_it_was_measured():
    problems = ts.Problems()
    series = ts.read_csv(WEATHER, time="time_hour", series="origin", problems=problems)
    assert [one.name for one in series] == ["EWR", "JFK", "LGA"]
    assert series[0].channels == CHANNELS and not problems
    assert sum(map(len, series)) == 1362
    first = series[0].read(0, 1)[0]
    np.testing.assert_array_equal(first, [26.96, 6.98, 42.14, 11.5078, 0, 1024, 10])
    assert series[0].times_of(0, 1) == np.datetime64("2013-02-10T00", "ns").astype(np.int64)
    missing = sum(int(np.isnan(one.read(0, len(one))[:, 5]).sum()) for one in series)
    assert missing == 152
    regular = ts.resample(series, step=HOUR)
    assert [len(one) for one in regular] == [456] * 3
    gaps = [np.isnan(one.read(0, 456)).all(axis=1).sum() for one in regular]
    assert gaps == [456 - len(one) for one in series] and sum(gaps) == 6


def write(folder, text, name="table.csv"):
    path = folder / name
    path.write_text(text)
    return path


def test_odd_cells_rows_and_times_of_a_file_are_counted(tmp_path):
    path = write(
        tmp_path,
        "t,name,x,y\n2020-01-01,b,1,2\n2020-01-03T00:00:00+02:00,b,3\n2020-01-02,b,NA,-999\n"
        "never,b,5,6\n2020-01-02,b,oops,8,9\n\n2020-01-01,a,,null\n",
    )
    problems = ts.Problems()
    series = ts.read_csv(path, time="t", series="name", missing=[-999], problems=problems)
    assert [one.name for one in series] == ["b", "a"]
    np.testing.assert_array_equal(series[0].read(0, 3), [[1, 2], [np.nan, 8], [3, np.nan]])
    third = np.datetime64("2020-01-02T22", "ns").astype(np.int64)
    assert series[0].times_of(2, 3) == third
    assert problems.counts() == {
        "dropped": {"unreadable_time": 1},
        "repaired": {
            "duplicate_times": 1, "ragged_row": 2, "shuffled_times": 2, "unreadable_value": 1,
        },
    }  # fmt: skip


def test_a_file_without_names_or_times_is_one_series(tmp_path):
    path = write(tmp_path, "x;y\n1;2\n3;4\n")
    (one,) = ts.read_csv(path, delimiter=";")
    assert (one.name, one.channels, one.times) == ("table", ("x", "y"), None)
    np.testing.assert_array_equal(one.read(0, 2), [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "lacks the columns"),
        ("t\n1\n", {"time": "t"}, "lacks the columns that hold values"),
        ("x,y\n1,2\n", {"time": "t"}, r"lacks the columns \['t'\], available: \['x', 'y'\]"),
        ("x,x\n1,2\n", {}, "more than once"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, options, message):
    with pytest.raises(DataError, match=message):
        ts.read_csv(write(tmp_path, text), **options)


def test_files_that_are_none_say_so(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00x")
    for path in (tmp_path / "bytes.csv", tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(DataError, match="cannot be read as CSV"):
            ts.read_csv(path)
    with pytest.raises(WindowError, match="No row of the table is left"):
        ts.read_csv(write(tmp_path, "x,y\n"))
    np.save(tmp_path / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    for path in (tmp_path / "objects.npy", tmp_path / "bytes.csv", tmp_path / "nowhere.npy"):
        with pytest.raises(DataError, match=r"cannot be read as an \.npy file"):
            ts.read_npy(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int64, np.uint8, bool])
def test_arrays_on_disk_are_mapped_and_travel_as_paths(tmp_path, dtype):
    rows = (walk(2000, 3) * 3).astype(dtype)
    np.save(tmp_path / "one.npy", rows)
    np.save(tmp_path / "two.npy", rows.reshape(2, 1000, 3))
    (one,) = ts.read_npy(tmp_path / "one.npy", times=range(0, 4000, 2))
    assert one.name == "one"
    many = ts.read_npy(tmp_path / "two.npy")
    assert len(pickle.dumps([one, *many])) < 5000
    one, *many = pickle.loads(pickle.dumps([one, *many]))
    np.testing.assert_array_equal(one.read(3, 50), rows[3:50].astype(np.float64))
    np.testing.assert_array_equal(many[1].read(0, 9), rows[1000:1009].astype(np.float64))
    assert one.times_of(5, 7).tolist() == [10, 12]


def test_rows_of_dicts_and_whole_series_in_a_row():
    dates = [datetime(2020, 1, 1, h) for h in range(4)]
    rows = [{"t": t, "id": "ab"[i % 2], "x": i, "y": None} for i, t in enumerate(dates)]
    series = ts.read_rows(rows, time="t", series="id")
    assert [one.name for one in series] == ["a", "b"] and series[0].channels == ("x", "y")
    np.testing.assert_array_equal(series[1].read(0, 2), [[1, np.nan], [3, np.nan]])
    whole = [
        {"target": [[1, 2, None], [4, 5, 6]], "start": "2020-01-01", "id": "first"},
        {"target": [[1], [2]], "start": "2020-02-01", "id": "second"},
    ]
    series = ts.read_series_rows(
        whole, values="target", name="id", time="start", step=HOUR, channels_first=True
    )
    np.testing.assert_array_equal(series[0].read(0, 3), [[1, 4], [2, 5], [np.nan, 6]])
    assert np.diff(np.asarray(series[0].times)).tolist() == [3600 * 10**9] * 2
    for wrong, message in (
        ({"rows": []}, "no rows"),
        ({"rows": [{"x": 1}]}, r"Row 0 lacks \['target'\]"),
        ({"rows": [{"target": ["a"]}]}, "no array of numbers"),
        ({"rows": [whole[0], whole[0]], "name": "id"}, "second series 'first'"),
    ):
        with pytest.raises(DataError, match=message):
            ts.read_series_rows(**({"values": "target"} | wrong))
    with pytest.raises(DataError, match="no rows"):
        ts.read_rows([])


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([], {}, "There is no series"),
        (np.zeros((2, 3, 4, 5)), {}, r"expected \(n, C\), \(n,\) or \(S, n, C\)"),
        (np.full((3, 2), "a"), {}, "expected numbers"),
        ({"a": [[1, 2], [3]]}, {}, "not an array of numbers"),
        (np.zeros((3, 0)), {}, "at least one channel"),
        (np.zeros((3, 2)), {"channels": ["x"]}, "2 channels and 1 names"),
        (np.zeros((3, 2)), {"times": np.arange(4)}, "one time for each row"),
        (np.zeros((3, 2)), {"times": np.array(["a", "b", "c"])}, "expected dates"),
        ({"a": np.zeros((3, 2))}, {"times": {"b": np.arange(3)}}, "no times for series 'a'"),
    ],
)
def test_arrays_that_are_no_series_say_why(arrays, options, message):
    with pytest.raises(WindowError, match=message):
        ts.from_arrays(arrays, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": 1}, {"length": 2.5}, {"stride": 0}, {"min_observed": 1.5},
        {"max_missing_run": -1}, {"max_gap": 0}, {"max_gap": math.inf},
        {"missing_channel": "hide"}, {"constant_channel": ""},
    ],
)  # fmt: skip
def test_cuts_out_of_their_domain_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        ts.Cut(**({"length": 4} | wrong))


def test_scalings_out_of_their_domain_are_refused():
    good = ts.fit_scaling(some_series()).as_dict()
    for change, message in (
        ({"method": "max"}, "expected one of"),
        ({"scale": [1.0, 0.0]}, "each scale positive"),
        ({"center": [1.0]}, "one for each of the channels"),
        ({"rows": None}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            ts.Scaling.from_dict(good | change)
    with pytest.raises(ConfigError, match="cannot be read"):
        ts.Scaling.from_dict(None)
    with pytest.raises(WindowError, match="no series"):
        ts.fit_scaling([])
    named = some_series((9,), channels=2)[0]
    other = ts.from_arrays(walk(9), channels=["x", "y"])[0]
    with pytest.raises(WindowError, match=r"\['x', 'y'\]"):
        ts.fit_scaling([named, other])
    with pytest.raises(WindowError, match=r"\['x', 'y'\]"):
        ts.WindowStream([other], ts.Cut(length=3), scaling=ts.Scaling.from_dict(good))


# The hot lane, end to end on weather.


@pytest.fixture(scope="module")
def judged():
    """Weather windows, the scaling of their training part, and a scorer of wet ones."""
    problems = ts.Problems()
    parts = ts.split_by_time(weather(problems), {"train": 0.7, "report": 0.3}, gap=24, cuts=None)
    scaling = ts.fit_scaling(parts["train"])
    cut = ts.Cut(length=24, stride=1, max_missing_run=4)
    source = ts.WindowSource(parts["train"], cut, scaling=scaling, problems=problems)
    stacked = source.stacked()
    rain = np.nansum(scaling.undo(stacked["values"], "EWR")[..., 4], axis=1)
    windows = ts.WINDOWS.stack([source[i] for i in range(len(source))])
    return source, scaling, fit_series(windows, rain, deeper=False)


@pytest.mark.parametrize("path", ["map", "iter", "stream"])
def test_weather_goes_through_registry_ledger_filter_and_monitor(judged, tmp_path, path):
    source, scaling, scorer = judged
    version = mgf.Registry(tmp_path).publish(scorer, metadata={"scaling": scaling.as_dict()})
    ds = {
        "map": source.dataset,
        "iter": lambda: source.dataset().to_iter_dataset(IN_PROCESS),
        "stream": lambda: ts.WindowStream(source._series, source._cut, scaling=scaling),
    }[path]()
    ds = mgf.score_filter(
        ds, tmp_path, keep_ratio=0.25, windows=ts.WINDOWS, block_windows=64, annotate=True,
        source_key="series", name=path, spool_share=0.0 if path == "map" else 0.25,
    )  # fmt: skip
    if path == "map":
        ds = ds.to_iter_dataset(IN_PROCESS)
    iterator = iter(ds)
    first = [next(iterator) for _ in range(40)]
    state = iterator.get_state()
    rest = list(iterator)
    resumed = iter(ds)
    resumed.set_state(state)
    places = [(e["series"], int(e["start"])) for e in rest]
    assert [(e["series"], int(e["start"])) for e in resumed] == places and places
    kept = first + rest
    assert len(kept) == len(source) // 4
    assert {e["scorer_version"] for e in kept} == {version}
    stacked = ts.WINDOWS.stack(kept)
    np.testing.assert_array_equal([e["score"] for e in kept], scorer.score(stacked))
    rain = [np.nansum(scaling.undo(e["values"], "EWR")[:, 4]) for e in kept]
    every = np.nansum(scaling.undo(source.stacked()["values"], "EWR")[..., 4], axis=1)
    assert np.mean(rain) > 1.5 * every.mean()
    stored = mgf.Registry(tmp_path).load(version).metadata["scaling"]
    assert ts.Scaling.from_dict(stored) == scaling
    del ds, iterator, resumed  # what is not written yet is written when a filter ends
    gc.collect()
    seen = run_view(tmp_path)["filters"][path]
    assert not run_view(tmp_path)["problems"]
    assert {row["label"] for row in seen["groups"]["source"]} == {"EWR", "JFK", "LGA"}
    assert seen["version"] == version and seen["series"]["psi"][-1] is not None


def test_set_aside_windows_are_the_raw_ones_with_their_gaps(judged, tmp_path):
    source, _, _ = judged
    ds = mgf.score_filter(
        source.dataset(), tmp_path, keep_ratio=0.25, windows=ts.WINDOWS, block_windows=64,
        spool_share=0.5, source_key="series",
    )  # fmt: skip
    for _ in ds:
        pass
    del ds
    gc.collect()
    spooled = mgf.SpooledWindows(tmp_path)
    assert len(spooled) > 100 and np.isnan(spooled.take(np.arange(len(spooled)))).any()
    for i in range(0, len(spooled), 17):
        element = source[int(spooled.blocks[i] * 64 + spooled.positions[i])]
        np.testing.assert_array_equal(spooled[i], element["values"])
        assert spooled.sources[i] == element["series"]


def test_a_sensor_that_breaks_shows_as_drift(judged, tmp_path):
    source, _, scorer = judged
    stacked = source.stacked()["values"]
    order = np.random.default_rng(0).permutation(len(stacked))
    broken = stacked[order].copy()
    broken[:, :, :3] = broken[:, :1, :3]  # three sensors repeat their first value
    mgf.Registry(tmp_path).publish(scorer)
    windows = [{"values": w} for w in [*stacked[order], *broken]]
    ds = mgf.score_filter(
        grain.MapDataset.source(windows), tmp_path, keep_ratio=0.25, block_windows=32,
        windows=mgf.SeriesWindows("values"),
    )  # fmt: skip
    for _ in ds:
        pass
    del ds
    gc.collect()
    series = run_view(tmp_path)["filters"]["default"]["series"]
    excess = [psi / limit for psi, limit in zip(series["psi"], series["psi_limit"])]
    assert excess[0] < 1 < excess[-1], excess


def test_nothing_heavy_is_imported_before_it_is_used():
    folder = Path(str(ts.__file__)).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                first = ast.unparse(node).split()[1].split(".")[0]
                heavy = {"jax", "flax", "tensorstore", "pyarrow", "datasets", "pandas"}
                assert first not in heavy, path.name


def test_masks_of_steps_and_of_values_hide_what_was_not_observed():
    values = walk(6, 2).astype(np.float32)
    steps, each = np.arange(6) != 2, np.ones((6, 2), bool)
    each[4, 1] = False
    windows = mgf.SeriesWindows("values", "mask")
    whole = windows.stack([{"values": values, "mask": each}] * 2)
    np.testing.assert_array_equal(np.isnan(whole), np.stack([~each] * 2))
    mixed = windows.stack([{"values": values, "mask": each}, {"values": values, "mask": steps}])
    np.testing.assert_array_equal(np.isnan(mixed[0]), ~each)
    np.testing.assert_array_equal(np.isnan(mixed[1]), ~steps[:, None].repeat(2, 1))
    assert not np.isnan(values).any()
    for wrong in (np.ones((6, 3), bool), np.ones((5, 2), bool), np.ones((6, 2), int)):
        with pytest.raises(WindowError, match="Mask 0 is"):
            windows.stack([{"values": values, "mask": wrong}] * 2)

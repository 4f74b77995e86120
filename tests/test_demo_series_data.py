"""The storms' world: tables read as data, rare events by definition, damage of known kind."""

import base64
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.demo import frame
from metagrad_filter.demo import series_data as sd
from metagrad_filter.demo.corruptions import CORRUPTIONS, corrupt
from metagrad_filter.errors import ConfigError, DataError, WindowError

WEATHER = Path(__file__).parent / "data" / "weather.csv"

# pandas 2.3: DataFrame({"name": ["Amy", None, "Bob"], "year": [1975, 1976, 1977],
# "wind": [25.0, nan, 30.5], "hour": [0, 6, 12]}), pickled with protocol 5 and packed with xz.
TABLE = (
    "{Wp48S^xk9=GL@E0stWa8~^|S5YJf5-~*ikC0zhO0Zw-Z*km{{l8udet+)tjTI(p8u%t}sda@CqZa&69bz=j=K@T"
    "@(G>XYns@+;`M-35~U$7R7Ii8-;$9l8YJ^MYDr!97i^MCF)HlnN+8-jB}sCMe?0c*gSwToo8V+;><R=;vYm!UPcJ"
    "HnWCyaO9PpL|6SaRp~41rf>#V?^$uJDd6~de*bkn@6tywu`jR*5wodDm-z4?K~RPvJMiry8S0s`y$2I0Xn%~`zw0"
    "ENUoWnFG`<>CZ-O^n(cPGGb-k<5oxec70&uh9W7H8GIsB|vDa0EhOHbmY2e24zb_yQJB=ds>9YF<P(gjMzU?nML%"
    "x(uOe)-V28Vo1?1cav<wMaqmqj4=q%lUT9>Ss!kV6uKjfimE{9AG5az)M~e~Uo&^G5^hs8oXa%!uMxhr;+)r1KQu"
    "72~{)%GujobkIH7*AG~39vro#9xwdpK{x((U2liq?>41$5~pd?iZFM%<%|=n7>Q}}*53bO$(a?%Jtc64S(jN3p7G"
    "g?u}m3J^kZIxkozDj^py|3Xj~!`w-(&oY^0cz8+r4fJ2)^ng}-F6vM8kNB_AR^wYGfdM7Or(6(GxA9_$g8o#zoQ%"
    "W`@Pg<~;zhmH)*@6mmVeJ$H71hzcPRSVe`fo6VU%Jj=xe?PdGt@B^A&97UfquBU7HYE-U26_so3aAh+#Xf+}y@{<"
    "VXslr^8mdSX7RzTAEy8lD00000rN7H)zKZL$00F@So(BK`9zU_PvBYQl0ssI200dcD"
)


# A pickle is read as data.

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner, inner, inner)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(PLAIN, st.sampled_from([4, 5]))
def test_plain_values_are_what_they_were(value, protocol):
    assert frame.inert(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<i8", "<i4"])
def test_arrays_are_what_they_were(dtype, order, protocol):
    array = np.array(np.arange(12).reshape(3, 4) / 2, dtype, order=order)
    found = frame._array(frame.inert(pickle.dumps(array, protocol)))
    np.testing.assert_array_equal(found, array)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_runs(tmp_path):
    path = tmp_path / "ran"
    content = pickle.dumps(Harmful(path), 5)
    assert isinstance(frame.inert(content), frame.Call) and not path.exists()
    with pytest.raises(DataError, match=r"expected a pandas\.DataFrame"):
        frame.read_frame(content)
    assert not path.exists()
    pickle.loads(content)
    assert path.exists()  # the pickle would have run


def test_a_table_of_pandas_is_read():
    columns = frame.read_frame(lzma.decompress(base64.b85decode(TABLE)))
    assert list(columns) == ["name", "year", "wind", "hour"]
    assert columns["name"].tolist() == ["Amy", None, "Bob"]
    assert columns["year"].tolist() == [1975, 1976, 1977] and columns["year"].dtype == np.int64
    np.testing.assert_array_equal(columns["wind"], [25.0, np.nan, 30.5])


@given(st.binary(max_size=60) | st.integers(0, 10**6))
def test_damaged_tables_end_in_one_error(damage):
    content = lzma.decompress(base64.b85decode(TABLE))
    if isinstance(damage, int):
        content = content[: damage % len(content)]
    else:
        content = damage
    with pytest.raises(DataError):
        frame.read_frame(content)


def test_instructions_that_no_table_needs_are_not_followed():
    with pytest.raises(DataError, match="instruction EMPTY_SET at byte"):
        frame.read_frame(pickle.dumps({1, 2}, 4))


# Storms.


def storm_table():
    """Two storms: one intensifies, with an odd hour, a repeated and a missing reading."""
    hours = [0, 6, 9, 12, 18, 24, 30, 30, 42, 48, 54, 60]
    wind = [30, 35, 99, 40, 50, 65, 70, 75, 75, 70, 65, 60]
    rows = [("Amy", 30 + h // 24, h % 24, w) for h, w in zip(hours, wind)]
    rows += [("Bob", 1 + h // 24, h % 24, 40) for h in range(0, 72, 6)]
    columns = {
        "name": np.array([r[0] for r in rows], object),
        "year": np.array([1999] * len(rows)),
        "month": np.array([4 if r[0] == "Bob" or r[1] <= 30 else 5 for r in rows]),
        "day": np.array([r[1] if r[1] <= 30 else r[1] - 30 for r in rows]),
        "hour": np.array([r[2] for r in rows]),
        "lat": np.arange(len(rows)) * 1.0,
        "long": np.arange(len(rows)) * -2.0,
        "wind": np.array([r[3] for r in rows]),
        "pressure": np.full(len(rows), 1000),
    }
    return columns


def test_storms_are_six_hourly_with_gaps_as_nan():
    problems = sd.Problems()
    amy, bob = sd.storm_series(storm_table(), problems=problems)
    assert (amy.name, bob.name) == ("Amy-1999", "Bob-1999")
    assert problems.counts() == {"repaired": {"duplicate_times": 1}}
    nan = np.nan
    wind = amy.read(0, len(amy))[:, sd.WIND]
    np.testing.assert_array_equal(wind, [30, 35, 40, 50, 65, 75, nan, 75, 70, 65, 60])
    assert amy.times_of(0, 1) == np.datetime64("1999-04-30T00", "ns").astype(np.int64)
    assert (np.diff(np.asarray(amy.times)) == 6 * 3600 * 10**9).all()
    rows = bob.read(0, len(bob))
    np.testing.assert_array_equal(rows[:, 4], [nan] + [1.0] * 11)
    np.testing.assert_array_equal(rows[:, 5], [nan] + [-2.0] * 11)


def test_rapid_steps_are_24_hours_with_a_rise_of_30_knots():
    wind = np.array([30, 35, 40, 50, 59, 65, np.nan, 75, 70, 99.0])
    # From step 1 to 5 it rose by 30; from 0 to 4 by 29; from 5 to 9 by 34.
    assert np.flatnonzero(sd.rapid_steps(wind)).tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert not sd.rapid_steps(np.array([0.0, 50, 100, 200])).any()


@given(st.integers(0, 2**32), st.integers(0, 40))
def test_rapid_steps_are_their_definition(seed, length):
    rng = np.random.default_rng(seed)
    wind = rng.choice([20.0, 40, 55, 80, np.nan], length)
    expected = [
        any(wind[t0 + 4] - wind[t0] >= 30 for t0 in range(max(t - 4, 0), t) if t0 + 4 < length)
        for t in range(length)
    ]
    assert sd.rapid_steps(wind).tolist() == expected


def test_classes_say_where_the_event_is():
    rapid = np.zeros((3, 8), bool)
    rapid[1, 4], rapid[2, 3] = True, True
    assert sd.classes_of(rapid).tolist() == [sd.NORMAL, sd.RARE, sd.MIXED]


def many_storms(count=40, rows=30):
    rng = np.random.default_rng(0)
    values = {}
    for i in range(count):
        wind = 40 + np.clip(rng.normal(size=rows) * 9, -30, 60).cumsum()
        rest = rng.normal(size=(rows, 5)).cumsum(axis=0)
        values[f"storm {i}"] = np.insert(rest, sd.WIND, wind, axis=1)
    times = {name: np.arange(rows) * 6 for name in values}
    return sd.from_arrays(values, times=times, channels=sd.CHANNELS)


@pytest.fixture(scope="module")
def world():
    return sd.compose_storms(
        many_storms(), length=16, stride=1, shares=sd.SHARES, seed=3, problems=sd.Problems()
    )


def test_parts_share_no_storm_and_only_the_first_scales(world):
    members = [set(part.series.tolist()) for part in world.parts.values()]
    assert len(set().union(*members)) == sum(map(len, members)) == 40
    assert world.scaling.rows == 22 * 30
    for part in world.parts.values():
        assert part.values.shape[1:] == (16, 6) and part.values.dtype == np.float32
        assert len(part.rapid) == len(part.classes) == len(part.time) == len(part)
        one = part.take(np.arange(3))
        raw = next(s for s in many_storms() if s.name == one.series[2])
        wind = world.scaling.undo(one.values, "")[2, :, sd.WIND]
        start = one.start[2]
        np.testing.assert_allclose(wind, raw.read(start, start + 16)[:, sd.WIND], atol=1e-3)
        steps = sd.rapid_steps(raw.read(0, 30)[:, sd.WIND])[start : start + 16]
        assert one.rapid[2].tolist() == steps.tolist()


# Streams.


@given(st.integers(1, 300), st.sampled_from([0.0, 0.05, 0.5]), st.sampled_from([0.0, 0.3, 0.5]))
def test_a_stream_holds_the_shares_that_were_asked_for(world, count, rare, broken):
    stream = sd.build_stream(
        world.parts["train"], count=count, rare_share=rare, corrupt_share=broken, seed=1
    )
    assert len(stream) == count
    found = np.bincount(stream.windows.classes, minlength=3)
    spoiled = round(count * broken)
    assert found.tolist()[1:] == [min(round(count * rare), count - spoiled), spoiled]
    corrupted = stream.windows.classes == sd.CORRUPT
    assert ((stream.kinds >= 0) == corrupted).all() and ((stream.severities > 0) == corrupted).all()
    per_kind = np.bincount(stream.kinds[corrupted], minlength=7)
    assert per_kind.sum() == found[2] and np.ptp(per_kind) <= 3


def test_windows_of_a_stream_are_those_of_the_part_or_broken_ones(world):
    part = world.parts["train"]
    stream = sd.build_stream(part, count=120, seed=2)
    again = sd.build_stream(part, count=120, seed=2)
    np.testing.assert_array_equal(stream.windows.values, again.windows.values)
    place = {(s, a): i for i, (s, a) in enumerate(zip(part.series, part.start))}
    windows = stream.windows
    shift = stream.kind_names.index("shift")
    seen = set()
    for i in range(120):
        origin = place[windows.series[i], windows.start[i]]
        same = np.array_equal(windows.values[i], part.values[origin], equal_nan=True)
        assert same == (windows.classes[i] != sd.CORRUPT)
        wanted = sd.RARE if stream.kinds[i] == shift else sd.NORMAL
        if windows.classes[i] == sd.CORRUPT:
            assert part.classes[origin] == wanted
        else:
            assert part.classes[origin] == windows.classes[i]
        if windows.classes[i] == sd.NORMAL:
            assert origin not in seen  # drawn without repetition
            seen.add(origin)
    assert not np.array_equal(np.sort(stream.kinds), stream.kinds)
    other = sd.build_stream(part, count=120, seed=3)
    assert not np.array_equal(other.windows.start, stream.windows.start)


def test_streams_that_cannot_be_are_refused(world):
    part = world.parts["train"]
    wrong: list[dict[str, Any]] = [
        {"rare_share": 0.8, "corrupt_share": 0.3},
        {"count": 0},
        {"kinds": ()},
        {"kinds": ("rust",)},
        {"severities": (2.0,)},
    ]
    for options in wrong:
        with pytest.raises(ConfigError):
            sd.build_stream(part, **{"count": 50, **options})
    with pytest.raises(WindowError, match="no rare window"):
        sd.build_stream(part.of_class(sd.NORMAL), count=5)


# Damage.


def usual(count=200, length=16, channels=4, missing=0.1, seed=0):
    rng = np.random.default_rng(seed)
    steps = np.arange(length)[None, :, None] + 40 * rng.random((count, 1, channels))
    windows = np.sin(steps / 4) + 0.1 * rng.normal(size=(count, length, channels))
    windows[rng.random(windows.shape) < missing] = np.nan
    return windows.astype(np.float32)


@pytest.mark.parametrize("severity", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_is_repeatable_leaves_its_argument_and_what_is_missing(kind, severity):
    windows = usual()
    before = windows.copy()
    broken = corrupt(windows, kind, severity, seed=4)
    np.testing.assert_array_equal(windows, before)
    np.testing.assert_array_equal(broken, corrupt(windows, kind, severity, seed=4))
    assert broken.dtype == np.float32 and broken.shape == windows.shape
    now, then = np.isfinite(broken), np.isfinite(windows)
    if kind == "shuffle":
        now, then = now.sum(axis=1), then.sum(axis=1)
    np.testing.assert_array_equal(now, then)
    changed = (np.nan_to_num(broken, nan=9) != np.nan_to_num(windows, nan=9)).any(axis=1)
    assert changed.any(axis=1).all()
    if kind not in ("shuffle", "noise"):
        assert changed.sum(axis=1).max() == 1


def test_more_severe_is_further_from_what_it_was():
    windows = usual(missing=0)
    for kind in CORRUPTIONS:
        size = [np.abs(corrupt(windows, kind, s, seed=1) - windows).mean() for s in (0.2, 0.6, 1)]
        assert size[0] < size[1] < size[2], kind


def test_each_kind_of_damage_is_what_it_says():
    windows = usual(missing=0)
    every = np.arange(len(windows))

    def column(kind, severity):
        broken = corrupt(windows, kind, severity, seed=7)
        channel = (broken != windows).any(axis=1).argmax(axis=1)
        return broken[every, :, channel], windows[every, :, channel]

    low, was = column("dropout", 0.5)
    assert ((low == -4).sum(axis=1) == 4).all() and (low[low != -4] == was[low != -4]).all()
    off, was = column("offset", 0.5)
    assert np.allclose(np.abs(off - was).max(axis=1), 2, atol=1e-5)
    assert (off[:, 0] == was[:, 0]).all() and (np.diff(off != was, axis=1).sum(axis=1) == 1).all()
    still, was = column("stuck", 1.0)
    assert (np.ptp(still, axis=1) == 0).all()
    high, was = column("spikes", 1.0)
    assert (((high != was).sum(axis=1)) == 4).all()
    assert (np.abs(high - was)[high != was] > 1.99).all() and np.abs(high - was).max() < 8.01
    moved, was = column("shift", 0.5)
    later = (moved[:, 4:] == was[:, :-4]).all(axis=1) & (np.ptp(moved[:, :4], axis=1) == 0)
    earlier = (moved[:, :-4] == was[:, 4:]).all(axis=1) & (np.ptp(moved[:, -4:], axis=1) == 0)
    assert (later | earlier).all() and later.any() and earlier.any()
    mixed = corrupt(windows, "shuffle", 1.0, seed=7)
    assert (np.sort(mixed, axis=1) == np.sort(windows, axis=1)).all()
    loud = np.asarray(corrupt(windows, "noise", 1.0, seed=7) - windows)
    assert abs(loud.std() - 3) < 0.1 and abs(np.corrcoef(loud[:, 0, 0], loud[:, 1, 0])[0, 1]) < 0.3


def test_a_window_that_never_changes_is_survived():
    for windows in (np.zeros((3, 8, 2), np.float32), np.full((3, 8, 2), np.nan, np.float32)):
        for kind in CORRUPTIONS:
            assert not np.isinf(corrupt(windows, kind, 1.0, seed=0)).any()


@pytest.mark.parametrize(
    ("windows", "kind", "severity", "error", "message"),
    [
        (usual(2), "rust", 0.5, ConfigError, "kind is 'rust'"),
        (usual(2), "stuck", 0.0, ConfigError, "severity is 0.0"),
        (usual(2), "stuck", 1.5, ConfigError, "severity is 1.5"),
        (usual(2), "stuck", float("nan"), ConfigError, "severity is nan"),
        (usual(2)[0], "stuck", 0.5, WindowError, r"\(16, 4\)"),
        (usual(2)[:, :3], "stuck", 0.5, WindowError, "at least 4 steps"),
    ],
)
def test_damage_out_of_its_domain_is_refused(windows, kind, severity, error, message):
    with pytest.raises(error, match=message):
        corrupt(windows, kind, severity, seed=0)


def test_weather_has_one_row_an_hour():
    series = sd.read_weather(WEATHER)
    assert [len(one) for one in series] == [456] * 3
    assert series[0].channels == sd.WEATHER_CHANNELS


@pytest.mark.slow
def test_the_storms_of_the_wheel_are_the_pinned_ones():
    world = sd.build_storms()
    assert {p: len(w) for p, w in world.parts.items()} == {
        "train": 5043, "target": 1826, "gate": 1101, "report": 2093,
    }  # fmt: skip
    train = world.parts["train"]
    assert np.bincount(train.classes + 1).tolist() == [631, 3643, 769]
    assert world.problems.counts()["repaired"] == {"duplicate_times": 23}
    wind = world.scaling.undo(train.values, "")[..., sd.WIND]
    assert np.nanmin(wind) >= 10 and np.nanmax(wind) <= 165

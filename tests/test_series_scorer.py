"""Time series: statistics that are one definition everywhere, and what a scorer learns."""

import importlib
import itertools
import json
import math
import pickle
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, ScorerRejected, WindowError
from metagrad_filter.scorer import artifact
from metagrad_filter.scorer import fit_series as fit_module
from metagrad_filter.scorer.fit import distinct_windows, held_out
from metagrad_filter.scorer.fit_series import _ridge_path, fit_series
from metagrad_filter.scorer.series import SeriesScorer
from metagrad_filter.selection import kept_before
from metagrad_filter.statistics import rank_correlation

series = importlib.import_module("metagrad_filter.kernels.scorer.series")
loading = importlib.import_module("metagrad_filter.kernels.scorer.loading")
native = importlib.import_module("metagrad_filter.kernels.scorer._series_stats")

NAMES = series.STATISTICS
COUNT = len(NAMES)


def make_windows(count=20, length=40, channels=3, seed=0, missing=0.1):
    rng = np.random.default_rng(seed)
    windows = rng.normal(size=(count, length, channels)).cumsum(axis=1)
    windows[rng.random(windows.shape) < missing] = np.nan
    return windows.astype(np.float32)


def make_series_scorer(channels=3, seed=0, hidden=5, **fields):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    width = channels * COUNT
    parts = {"center": normal(width), "scale": np.abs(normal(width)) + 0.1, "skip": normal(width)}
    if hidden:
        parts |= {
            "hidden_kernel": normal(width, hidden),
            "hidden_bias": normal(hidden),
            "output_kernel": normal(hidden),
        }
    return SeriesScorer(channels, **({"bias": 0.25, "metadata": {"seed": seed}} | parts | fields))


def named(windows):
    """Statistics by name, each `(N, C)`."""
    found = series.statistics(windows)
    return {name: found[..., i] for i, name in enumerate(NAMES)}


# One definition.


@st.composite
def any_windows(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(0, 4)), draw(st.integers(1, 90)), draw(st.integers(1, 10)))
    windows = rng.normal(size=shape)
    form = draw(st.sampled_from(["noise", "walk", "integers", "constant", "sparse"]))
    if form == "walk":
        windows = windows.cumsum(axis=1)
    elif form == "integers":
        windows = np.round(windows)
    elif form == "constant":
        windows[:] = 0.1
    elif form == "sparse":
        windows *= rng.random(shape) < 0.1
    scale = draw(st.sampled_from([1.0, -1e-44, 1e-20, 1e6, 1e30, 3.4e38]))
    with np.errstate(over="ignore"):
        windows = (windows * scale).astype(np.float32)
    share = draw(st.sampled_from([0.0, 0.1, 0.8, 1.0]))
    windows[rng.random(shape) < share] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return windows


@given(any_windows(), st.sampled_from(native.isas()))
def test_native_equals_the_definition_bit_for_bit_and_all_is_finite(windows, isa):
    count, _, channels = windows.shape
    expected = series.reference_statistics(windows)
    found = native.statistics(windows, isa)
    assert found.dtype == np.float32 and found.shape == (count, channels, COUNT)
    assert found.tobytes() == expected.tobytes()
    assert np.isfinite(found).all()
    for hidden in (0, 3, 70):
        scorer = make_series_scorer(channels, hidden=hidden)
        scores = scorer._head._native.score(windows, isa)
        assert scores.tobytes() == scorer._head.reference_scores(expected).tobytes()
        assert np.isfinite(scores).all()


def test_native_code_is_there_and_used():
    assert series.native_available()
    before = series.fallback_calls
    make_series_scorer().score(make_windows())
    assert series.fallback_calls == before


def test_statistics_are_what_their_names_say():
    windows = make_windows(12, 100, 2, missing=0).astype(np.float64)
    found = named(windows.astype(np.float32))
    x = windows.astype(np.float32).astype(np.float64)
    d = x - x.mean(axis=1, keepdims=True)
    spread = x.std(axis=1)
    steps = np.abs(np.diff(x, axis=1))

    def close(name, expected, atol=1e-6):
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=atol, err_msg=name)

    def close_log2(name, expected):
        np.testing.assert_allclose(found[name], np.log2(expected), atol=0.0861, err_msg=name)

    close("observed", 1.0)
    close("mean", x.mean(axis=1))
    close(
        "level", (x.mean(1, keepdims=True) + np.clip(d, -spread[:, None], spread[:, None])).mean(1)
    )
    close("minimum", x.min(axis=1))
    close("maximum", x.max(axis=1))
    close_log2("spread", spread)
    close_log2("roughness", steps.mean(axis=1) / spread)
    close_log2("jump", steps.max(axis=1) / steps.mean(axis=1))
    close("asymmetry", (d * np.abs(d)).sum(1) / (d * d).sum(1))
    close_log2("tail", (d**4).mean(1) / spread**4)
    edges = [block * 100 // 8 for block in range(9)]
    energies = [(d[:, a:b] ** 2).sum(1) for a, b in itertools.pairwise(edges)]
    close("burst", np.max(energies, axis=0) / (d * d).sum(1))
    for w in range(12):
        for c in range(2):
            trend = np.corrcoef(np.arange(100), x[w, :, c])[0, 1]
            assert found["trend"][w, c] == pytest.approx(trend, abs=1e-6)
    for lag in (1, 2, 4, 8):
        product = (d[:, lag:] * d[:, :-lag]).mean(axis=1)
        close(f"correlation_{lag}", np.clip(product / spread**2, -1, 1))
    for scale in (1, 2, 4, 8, 16, 32):
        rows = 100 // (2 * scale)
        halves = d[:, : rows * 2 * scale].reshape(12, rows, 2, scale, 2).sum(axis=3)
        energy = ((halves[:, :, 1] - halves[:, :, 0]) ** 2).sum(axis=1) / (2 * scale)
        close_log2(f"detail_{scale}", np.maximum(energy / (d * d).sum(1), 2.0**-20))
    r1, r2 = found["correlation_1"].astype(float), found["correlation_2"].astype(float)
    second = np.clip((r2 - r1**2) / (1 - r1**2), -1, 1)
    error = d[:, 2:] - (r1 * (1 - second))[:, None] * d[:, 1:-1] - second[:, None] * d[:, :-2]
    close_log2("surprise", (error**2).mean(1) / spread**2)
    close_log2("shock", (error**2).max(1) / (error**2).mean(1))


def test_energy_is_shared_out_over_the_scales():
    # A constant sum over 64 steps leaves nothing for scales beyond 32: the details are all of it.
    windows = make_windows(10, 64, 1, missing=0)
    found = named(windows)
    shares = sum(2.0 ** found[f"detail_{scale}"] for scale in series.SCALES)
    # The piecewise linear logarithm is up to 0.0861 below or above.
    assert (np.abs(shares - 1) < 0.07).all()


@given(st.integers(-40, 40), st.integers(0, 2**32), st.sampled_from([0.0, 0.3]))
def test_shapes_do_not_depend_on_the_unit(power, seed, missing):
    windows = make_windows(2, 50, 2, seed, missing)
    before, after = named(windows), named(windows * np.float32(2.0**power))
    np.testing.assert_allclose(after["spread"], before["spread"] + power, rtol=1e-6, atol=1e-6)
    for name in ("mean", "level", "minimum", "maximum"):
        np.testing.assert_array_equal(after[name], before[name] * np.float32(2.0**power))
    for name in ("observed", *NAMES[6:]):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_broken_sensors_show():
    rng = np.random.default_rng(0)
    windows = np.sin(np.arange(64) / 4)[None, :, None] + 0.1 * rng.normal(size=(4, 64, 1))
    windows[1, 20:, 0] = windows[1, 20, 0]
    windows[2, 30, 0] += 50
    windows[3, ::2, 0] = np.nan
    found = {name: values[:, 0] for name, values in named(windows.astype(np.float32)).items()}
    np.testing.assert_allclose(found["stuck"], [0, 43 / 63, 0, 0], rtol=1e-6)
    assert found["stuck_run"][1] == found["stuck"][1]
    assert found["jump"][2] > found["jump"][0] + 2 and found["tail"][2] > found["tail"][0] + 2
    assert found["observed"].tolist() == [1, 1, 1, 0.5]
    # One spike hardly moves the level; it moves the mean by 50 / 64.
    assert abs(found["level"][2] - found["level"][0]) < 0.3 < found["mean"][2] - found["mean"][0]


# Missing and odd values: promises that hold for any input.

ODD = {
    "NaN": np.full((1, 9, 2), np.nan),
    "inf": np.full((1, 9, 2), np.inf),
    "-inf": np.full((1, 9, 2), -np.inf),
    "a missing channel": np.stack([np.arange(9.0), np.full(9, np.nan)], axis=1)[None],
    "one value": np.where(np.arange(9) == 4, 7.0, np.nan)[None, :, None].repeat(2, axis=2),
    "neighbours never seen": np.where(np.arange(9) % 2, np.nan, np.arange(9))[None, :, None],
    "constant": np.full((1, 9, 2), 0.1),
    "zeros": np.zeros((1, 9, 2)),
    "huge": np.array([1e30, -1e30, 3.4e38, -3.4e38, 0.0])[None, :, None],
    "subnormal": np.array([1e-45, 0.0, -1e-45, 2e-45])[None, :, None],
    "beyond float32": np.array([1e300, 1.0, 2.0])[None, :, None],
    "one step": np.ones((1, 1, 2)),
    "one missing step": np.full((1, 1, 1), np.nan),
    "two steps": np.array([1.0, 2.0])[None, :, None],
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("case", ODD)
def test_scores_are_finite_whatever_the_values(monkeypatch, case, forced):
    if forced:
        monkeypatch.setenv(loading.NO_NATIVE, "1")
    windows = ODD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = series.statistics(windows)
        for hidden in (0, 4):
            scores = make_series_scorer(windows.shape[2], hidden=hidden).score(windows)
            assert scores.dtype == np.float32 and np.isfinite(scores).all()
    assert np.isfinite(found).all()


def test_missing_values_are_counted_and_left_out():
    windows = make_windows(3, 30, 2, missing=0)
    gaps = np.random.default_rng(1).random(windows.shape) < 0.4
    gaps[0, :, 0] = True
    holes = [np.where(gaps, hole, windows).astype(np.float32) for hole in (np.nan, np.inf, -np.inf)]
    found = [series.statistics(w) for w in holes]
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    named_ = named(holes[0])
    np.testing.assert_allclose(named_["observed"], 1 - gaps.mean(axis=1), rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = np.nanmean(holes[0].astype(float), axis=1)
        lows, highs = np.nanmin(holes[0], axis=1), np.nanmax(holes[0], axis=1)
    np.testing.assert_allclose(named_["mean"], np.nan_to_num(means), rtol=1e-6)
    np.testing.assert_array_equal(named_["minimum"], np.nan_to_num(lows))
    np.testing.assert_array_equal(named_["maximum"], np.nan_to_num(highs))


def test_differences_are_taken_between_observed_neighbours_only():
    windows = np.array([0.0, 0.0, np.nan, 9.0, 9.5])[None, :, None]
    found = {name: float(values[0, 0]) for name, values in named(windows).items()}
    assert found["stuck"] == 0.5 and found["stuck_run"] == 0.25
    assert found["jump"] == 1.0  # steps of 0 and 0.5, not of 9


def test_a_constant_series_is_described_exactly():
    found = {k: v[0].tolist() for k, v in named(np.full((1, 77, 2), 0.1, np.float32)).items()}
    assert found["mean"] == found["level"] == found["minimum"] == [np.float32(0.1)] * 2
    assert found["spread"] == [-149, -149] and found["stuck"] == found["stuck_run"] == [1, 1]
    assert found["tail"] == found["trend"] == found["correlation_1"] == found["burst"] == [0, 0]


# A window's score is its own.


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("hidden", [0, 33])
def test_a_score_does_not_depend_on_its_batch(monkeypatch, hidden, forced):
    if forced:
        monkeypatch.setenv(loading.NO_NATIVE, "1")
    scorer = make_series_scorer(hidden=hidden)
    windows = make_windows(60)
    together = scorer.score(windows)
    assert together.shape == (60,) and together.dtype == np.float32
    parts = np.split(windows, [7, 8, 41])
    assert np.concatenate([scorer.score(part) for part in parts]).tobytes() == together.tobytes()
    alone = [scorer.score(windows[i : i + 1])[0] for i in range(60)]
    np.testing.assert_array_equal(alone, together)
    assert scorer.score(windows[:0]).shape == (0,)


def test_threads_score_alike():
    scorer, windows = make_series_scorer(hidden=33), make_windows(64)
    expected = scorer.score(windows).tobytes()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: scorer.score(windows).tobytes(), range(64)))
    assert set(found) == {expected}


def test_other_layouts_and_dtypes_score_alike():
    scorer, windows = make_series_scorer(), make_windows()
    expected = scorer.score(windows)
    for other in (
        windows.astype(np.float64),
        windows.astype(">f4"),
        np.asfortranarray(windows),
        windows[:, ::-1].copy()[:, ::-1],
    ):
        np.testing.assert_array_equal(scorer.score(other), expected)
    integers = np.arange(24).reshape(2, 4, 3)
    np.testing.assert_array_equal(scorer.score(integers), scorer.score(integers.astype(np.float32)))


@pytest.mark.parametrize("hidden", [0, 40])
def test_the_score_is_its_formula(hidden):
    scorer, windows = make_series_scorer(hidden=hidden), make_windows()
    flat = series.statistics(windows).reshape(len(windows), -1).astype(np.float64)
    z = np.clip((flat - scorer.center) / scorer.scale, -8, 8)
    expected = scorer.bias + z @ scorer.skip
    if hidden:
        expected += np.maximum(z @ scorer.hidden_kernel + scorer.hidden_bias, 0) @ (
            scorer.output_kernel
        )
    np.testing.assert_allclose(scorer.score(windows), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("forced", [False, True])
def test_scores_beyond_float32_are_cut(monkeypatch, forced):
    if forced:
        monkeypatch.setenv(loading.NO_NATIVE, "1")
    huge = np.full(COUNT, 3e38, np.float32)
    scorer = make_series_scorer(1, hidden=0, skip=huge, center=-np.ones(COUNT, np.float32))
    scores = scorer.score(np.array([ODD["huge"][0], -ODD["huge"][0] * 1e-3]))
    assert np.isfinite(scores).all() and np.abs(scores).max() == np.finfo(np.float32).max


# Native code that is missing or broken.


@pytest.mark.parametrize("broken", [False, True])
def test_without_native_code_scores_are_the_same_after_one_warning(broken):
    program = f"""
import json, sys, types, warnings
def raises(*arguments):
    raise RuntimeError("broken on purpose")
module = types.ModuleType("_series_stats")
module.isas, module.Head = (lambda: ["portable"]), raises
sys.modules["metagrad_filter.kernels.scorer._series_stats"] = module if {broken} else None
import numpy as np
from metagrad_filter.kernels.scorer import series
from metagrad_filter.scorer.series import SeriesScorer
parts = np.load(sys.argv[1], allow_pickle=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    scores = [
        SeriesScorer(3, parts["center"], parts["scale"], parts["skip"]).score(parts["windows"])
        for _ in range(3)
    ]
messages = [str(w.message) for w in caught]
print(json.dumps([messages, series.fallback_calls, scores[2].tolist()]))
"""
    scorer, windows = make_series_scorer(hidden=0, bias=0.0), make_windows()
    messages, calls, scores = run_with_parts(program, windows=windows, **scorer.tensors())
    assert len(messages) == 1 and ("broken on purpose" in messages[0]) == broken
    assert calls == 3 and scores == scorer.score(windows).tolist()


def run_with_parts(program, **arrays):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parts.npz"
        np.savez(path, **arrays)
        run = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
        )
    return json.loads(run.stdout)


def test_numpy_can_be_chosen_silently(monkeypatch):
    scorer, windows = make_series_scorer(), make_windows()
    expected = scorer.score(windows)
    monkeypatch.setenv(loading.NO_NATIVE, "1")
    before = series.fallback_calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(scorer.score(windows), expected)
    assert not series.native_available() and series.fallback_calls == before


def test_the_instruction_set_can_be_named(monkeypatch):
    scorer, windows = make_series_scorer(), make_windows()
    expected = scorer.score(windows)
    for isa in native.isas():
        monkeypatch.setenv(series.ISA, isa)
        np.testing.assert_array_equal(scorer.score(windows), expected)
    monkeypatch.setenv(series.ISA, "avx1024")
    with pytest.raises(ConfigError, match=r"'avx1024'.*portable"):
        scorer.score(windows)


def test_native_code_checks_sizes_before_it_reads():
    empty = np.zeros(0, np.float32)
    for windows in (np.zeros((2, 3)), np.zeros((1, 0, 2)), np.zeros((1, 2, 0))):
        with pytest.raises(ValueError, match="shape"):
            native.statistics(windows.astype(np.float32))
    with pytest.raises(TypeError):
        native.statistics(np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="instruction set"):
        native.statistics(np.zeros((1, 2, 3), np.float32), "mmx")
    row, short = np.zeros(COUNT, np.float32), np.zeros(COUNT - 1, np.float32)
    for parts in [
        (row, short, row, empty, empty, empty),
        (row, row, short, empty, empty, empty),
        (row, row, row, row, empty, empty),
        (row, row, row, row, row[:1], empty),
    ]:
        with pytest.raises(ValueError, match="must hold"):
            native.Head(*parts, 0.0)
    head = native.Head(row, row + 1, row, empty, empty, empty, 0.0)
    with pytest.raises(ValueError, match="features"):
        head.score(np.zeros((1, 2, 2), np.float32))


# Wrong input.


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((4, 3)), r"shape \(4, 3\), expected \(N, T, C\)"),
        (np.zeros((2, 0, 3)), r"\(2, 0, 3\), expected at least one step"),
        (np.zeros((2, 5, 0)), "at least one step"),
        (np.zeros((2, 5, 4)), "4 channels, the scorer was fitted for 3"),
        (np.zeros((2, 5, 3), bool), "dtype bool"),
        (np.zeros((2, 5, 3), complex), "dtype complex128"),
        (np.full((2, 5, 3), "a"), "dtype <U1"),
        (np.zeros((2, 5, 3), object), "dtype object"),
    ],
)
def test_unreadable_windows_are_refused(windows, message):
    with pytest.raises(WindowError, match=message):
        make_series_scorer().score(windows)


ROW = np.zeros(COUNT, np.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"channels": True}, "channels is True"),
        ({"channels": 2.0}, "channels"),
        ({"channels": 10**9}, "channels"),
        ({"channels": 2}, r"center .*\(52,\)"),
        ({"bias": math.nan}, "bias"),
        ({"bias": math.inf}, "bias"),
        ({"bias": 10**400}, "bias"),
        ({"bias": "0"}, "bias"),
        ({"strength": -1.0}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"metadata": []}, "metadata"),
        ({"center": ROW.astype(float)}, "center is float64"),
        ({"center": ROW[:-1]}, "center"),
        ({"scale": ROW}, "scale holds 0.0"),
        ({"scale": ROW - 1}, "scale holds -1.0"),
        ({"skip": ROW + np.nan}, "skip holds NaN"),
        ({"hidden_bias": ROW[:2]}, "lacks"),
        ({"hidden_kernel": ROW, "hidden_bias": ROW, "output_kernel": ROW}, "hidden_kernel"),
        (
            {
                "hidden_kernel": np.zeros((COUNT, 2), np.float32),
                "hidden_bias": ROW[:2],
                "output_kernel": ROW[:3],
            },
            r"output_kernel is float32\(3,\)",
        ),
    ],
)
def test_fields_out_of_their_domain_are_refused(fields, message):
    base = {"channels": 1, "center": ROW, "scale": ROW + 1, "skip": ROW}
    with pytest.raises(ConfigError, match=message):
        SeriesScorer(**(base | fields))


# Storage.


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_scorer_is_its_parts(hidden):
    scorer = make_series_scorer(hidden=hidden, strength=2.0)
    fields = json.loads(json.dumps(scorer.fields()))
    rebuilt = SeriesScorer.from_parts(fields, scorer.tensors(), strength=2.0, metadata={"a": 1})
    assert (rebuilt.kind, SeriesScorer.kind) == ("series", "series")
    assert (rebuilt.strength, rebuilt.metadata) == (2.0, {"a": 1})
    copied = pickle.loads(pickle.dumps(scorer))
    for other in (rebuilt, copied, replace(scorer, metadata={})):
        np.testing.assert_array_equal(other.score(make_windows()), scorer.score(make_windows()))


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"channels": "3"}, {}, "channels"),
        ({"channels": 4}, {}, "center"),
        ({"bias": None}, {}, "bias"),
        ({"definition": 2}, {}, "definition is 2"),
        ({"definition": True}, {}, "definition is True"),
        ({"statistics": 25}, {}, "statistics is 25"),
        ({"extra": 1}, {}, "extra"),
        ({}, {"extra": ROW}, "extra"),
        ({}, {"output_kernel": None}, "The tensors are"),
        ({}, {"skip": ROW}, "skip"),
    ],
)
def test_odd_parts_are_refused(fields, tensors, message):
    scorer = make_series_scorer()
    changed = {k: v for k, v in (scorer.tensors() | tensors).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        SeriesScorer.from_parts(scorer.fields() | fields, changed, strength=math.inf, metadata={})


def test_golden_windows_depend_on_the_channels_alone_and_tell_scorers_apart():
    for channels in (1, 3, 8):
        windows = make_series_scorer(channels, 0).golden_windows()
        assert windows.shape == (8, 32, channels) and windows.dtype == np.float32
        # Some values, all of one channel, and never all of a window with several.
        assert np.isnan(windows[4:]).any() and np.isnan(windows[2, :, 0]).all()
        assert channels == 1 or not np.isnan(windows).all(axis=(1, 2)).any()
        np.testing.assert_array_equal(windows, make_series_scorer(channels, 1).golden_windows())
    scorer, windows = make_series_scorer(hidden=0), make_series_scorer().golden_windows()
    z = scorer.standardized(series.statistics(windows))
    # Whichever weight changes, some golden score does.
    assert (np.abs(z).max(axis=0) > 0).all()


def test_a_published_scorer_comes_back_and_a_damaged_one_does_not(tmp_path):
    scorer = make_series_scorer(strength=3.0)
    version = mgf.Registry(tmp_path).publish(scorer)
    loaded = mgf.Registry(tmp_path).load(version)
    assert isinstance(loaded, SeriesScorer) and loaded.strength == 3.0
    np.testing.assert_array_equal(loaded.score(make_windows()), scorer.score(make_windows()))
    payload, manifest = artifact.dump(scorer)
    for position in range(0, len(payload), 97):
        changed = bytearray(payload)
        changed[position] ^= 1 << position % 8
        with pytest.raises(ScorerRejected):
            artifact.load(bytes(changed), manifest)
    with pytest.raises(ScorerRejected):
        artifact.load(payload, artifact.seal(manifest | {"kind": "text"}))


# Learning.


def sensors(count, seed, length=48, channels=3):
    """Windows and what each is: 0 usual, 1 rare event, 2 stuck, 3 spike, 4 noise, 5 gaps.

    A rare event is a short oscillation in channel 1; a broken sensor is any channel.
    """
    rng = np.random.default_rng(seed)
    period = rng.uniform(10, 40, (count, 1, channels))
    phase = rng.uniform(0, 2 * np.pi, (count, 1, channels))
    x = np.sin(2 * np.pi * np.arange(length)[None, :, None] / period + phase)
    x += 0.2 * rng.normal(size=x.shape)
    x = x * np.exp(0.3 * rng.normal(size=phase.shape)) + rng.normal(size=phase.shape)
    kind = rng.choice(6, count, p=[0.6, 0.1, 0.1, 0.05, 0.1, 0.05])
    for i in range(count):
        channel, start = rng.integers(channels), rng.integers(length - 16)
        if kind[i] == 1:
            x[i, start : start + 16, 1] += 2.5 * np.sin(2.0 * np.arange(16)) * np.hanning(16)
        elif kind[i] == 2:
            x[i, length // 3 :, channel] = x[i, length // 3, channel]
        elif kind[i] == 3:
            x[i, start, channel] += rng.choice([-1, 1]) * rng.uniform(6, 50)
        elif kind[i] == 4:
            x[i, :, channel] = rng.normal(size=length) * x[i, :, channel].std()
        elif kind[i] == 5:
            x[i][rng.random((length, channels)) < 0.4] = np.nan
    return x.astype(np.float32), kind


WORTH = np.array([0.0, 2.0, -2.0, -2.0, -1.5, -1.0])


@pytest.fixture(scope="module")
def world():
    """Windows, noisy labels, and the scorer of their fit."""
    windows, kind = sensors(1500, 1)
    labels = WORTH[kind] + 0.5 * np.random.default_rng(2).normal(size=1500)
    return windows, labels, fit_series(windows, labels)


FRESH, FRESH_KIND = sensors(1500, 3)


def agreement(scorer):
    return rank_correlation(scorer.score(FRESH), WORTH[FRESH_KIND])


def better(scores, a, b):
    """How often a window of kind `a` scores above one of kind `b`."""
    first, second = scores[np.isin(FRESH_KIND, a)], scores[np.isin(FRESH_KIND, b)]
    return (first[:, None] > second[None]).mean()


def test_rare_events_score_above_usual_windows_and_broken_sensors_below(world):
    _, _, scorer = world
    scores = scorer.score(FRESH)
    means_only = max(
        abs(rank_correlation(np.nan_to_num(np.nanmean(FRESH, axis=1))[:, c], WORTH[FRESH_KIND]))
        for c in range(3)
    )
    assert means_only < 0.15
    assert agreement(scorer) > 0.75
    assert better(scores, [1], [0]) > 0.95
    assert better(scores, [1], [2, 3, 4, 5]) > 0.97
    assert better(scores, [0], [2, 3, 4, 5]) > 0.9
    metadata = scorer.metadata
    assert set(metadata) == {
        "form", "ridge", "labels", "rank_correlation", "reference", "reference_windows"
    }  # fmt: skip
    assert metadata["labels"] == 1500 and 0.5 < metadata["rank_correlation"] < 1
    json.dumps(metadata)


def test_the_reference_is_the_quantiles_of_scores_of_windows_that_were_not_fitted(world):
    windows, _, scorer = world
    reference = scorer.metadata["reference"]
    scores = scorer.score(windows[held_out(len(windows), 0)])
    assert scorer.metadata["reference_windows"] == len(scores)
    assert len(reference) == 257 and reference == sorted(reference)
    assert (reference[0], reference[-1]) == (scores.min(), scores.max())
    assert reference[128] == pytest.approx(np.median(scores), abs=1e-5)
    assert all(type(value) is float for value in reference)


def test_the_same_seed_gives_the_same_scorer(world):
    windows, labels, _ = world
    fits = [fit_series(windows[:300], labels[:300], seed=2**40) for _ in range(2)]
    assert fits[0].metadata == fits[1].metadata
    for name, tensor in fits[0].tensors().items():
        np.testing.assert_array_equal(tensor, fits[1].tensors()[name])


def test_the_general_fit_dispatches_here(world):
    windows, labels, _ = world
    scorer = mgf.fit_scorer(windows[:300], labels[:300], kind="series", seed=5)
    same = fit_series(windows[:300], labels[:300], seed=5)
    assert isinstance(scorer, SeriesScorer) and scorer.metadata == same.metadata


def test_a_few_monstrous_windows_and_labels_hardly_change_the_ranking(world):
    windows, labels, clean = world
    windows, labels = windows.copy(), labels.copy()
    hit = np.random.default_rng(4).choice(1500, 8, replace=False)
    windows[hit[:4]] *= 1e30
    labels[hit[4:]] *= 1e6
    scorer = fit_series(windows, labels)
    assert agreement(scorer) > agreement(clean) - 0.03
    # Statistics without quantiles, such as shares of stuck steps, keep a scale in [0, 1] anyway.
    ratio = scorer.scale / clean.scale
    assert (ratio > 0.5).all() and (ratio < 2).all()


def test_more_statistics_than_windows_can_be_fitted(world):
    windows, labels, _ = world
    scorer = fit_series(windows[:60], labels[:60], deeper=False)
    assert scorer.features > 60 and agreement(scorer) > 0.2


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 2**32))
def test_the_ridge_solution_solves_its_equations(count, features, seed):
    rng = np.random.default_rng(seed)
    z, targets = rng.normal(size=(count, features)) + 1, rng.normal(size=count) + 2
    for ridge, weights, bias in _ridge_path(z, targets):
        residual = z @ weights + bias - targets
        # The gradient of mean residual^2 + ridge |w|^2 vanishes.
        np.testing.assert_allclose(z.T @ residual / count + ridge * weights, 0, atol=1e-8)
        assert residual.mean() == pytest.approx(0, abs=1e-9)


def test_equal_labels_give_a_scorer_that_ranks_nothing(world):
    scorer = fit_series(world[0][:200], np.full(200, 3.0))
    assert np.ptp(scorer.score(FRESH)) < 1e-4
    assert scorer.metadata["rank_correlation"] == 0


def interaction(count, seed):
    """Labels that no sum over statistics explains: one channel or the other is rough, not both."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 2, (count, 2)).astype(bool)
    noise = rng.normal(size=(count, 32, 2))
    smooth = noise.cumsum(axis=1)
    windows = np.where(rough[:, None], noise, smooth).astype(np.float32)
    return windows, (rough[:, 0] ^ rough[:, 1]).astype(float)


def test_a_network_is_kept_where_only_an_interaction_explains_the_labels():
    windows, labels = interaction(1200, 1)
    unseen, truth = interaction(600, 2)
    found = {}
    for deeper in (False, True):
        scorer = fit_series(windows, labels, deeper=deeper)
        found[deeper] = rank_correlation(scorer.score(unseen), truth)
        assert scorer.metadata["form"] == ("linear+mlp" if deeper else "linear")
        assert (scorer.hidden_kernel is not None) == deeper
    assert found[False] < 0.3 and found[True] > found[False] + 0.3


def test_a_network_must_rank_better_by_the_margin_to_be_kept(monkeypatch):
    windows, labels = interaction(600, 1)
    monkeypatch.setattr(fit_module, "_MARGIN", 2.0)  # no rank correlation is that much better
    scorer = fit_series(windows, labels)
    assert scorer.metadata["form"] == "linear" and scorer.hidden_kernel is None


def test_what_never_varied_in_the_fit_changes_no_score():
    windows, labels = interaction(1200, 1)
    silent = np.concatenate([windows, np.ones_like(windows[..., :1])], axis=2)
    scorer = fit_series(silent, labels)
    assert scorer.metadata["form"] == "linear+mlp"
    loud = silent.copy()
    loud[..., 2] = np.random.default_rng(0).normal(size=loud.shape[:2])
    np.testing.assert_allclose(scorer.score(loud), scorer.score(silent), atol=1e-5)


def test_held_out_labels_have_no_influence_on_the_scorer(world):
    windows, labels, _ = world
    windows, labels = windows[:400], labels[:400]
    assert len(distinct_windows(windows, labels)[0]) == 400
    changed, test = labels.copy(), held_out(400, 0)
    # Permuted among themselves, so that the ranks of all others stay.
    changed[test] = labels[test][::-1]
    fits = [fit_series(windows, y, deeper=False) for y in (labels, changed)]
    np.testing.assert_array_equal(fits[0].skip, fits[1].skip)
    assert fits[0].metadata["rank_correlation"] != fits[1].metadata["rank_correlation"]


ERRORS = {
    "one window": ({"windows": np.zeros((60, 4))}, r"\(60, 4\), expected \(N, T, C\)"),
    "text": ({"windows": np.full((60, 4, 1), "a")}, "dtype"),
    "labels' length": ({"labels": np.ones(99)}, r"\(99,\).*100"),
    "labels' axes": ({"labels": np.ones((100, 1))}, r"\(100, 1\)"),
    "a label NaN": ({"labels": np.r_[np.nan, np.ones(99)]}, "1 non-finite"),
    "too few": ({"windows": make_windows(49), "labels": np.ones(49)}, "49 distinct"),
    "none": ({"windows": make_windows(0), "labels": np.ones(0)}, "0 distinct"),
    "copies": ({"windows": np.ones((100, 4, 2), np.float32)}, "1 distinct"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_value(case):
    changes, message = ERRORS[case]
    with pytest.raises(WindowError, match=message):
        fit_series(**({"windows": make_windows(100), "labels": np.arange(100.0)} | changes))


# The filter, end to end.

IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def filtered(run_dir, path, count=200, **options):
    elements = [{"values": w, "index": i} for i, w in enumerate(FRESH[:count])]
    ds = grain.MapDataset.source(elements)
    if path == "iter":
        ds = ds.to_iter_dataset(IN_PROCESS)
    options = {"keep_ratio": 0.3, "block_windows": 40, "windows": mgf.SeriesWindows("values")} | (
        options
    )
    return mgf.score_filter(ds, run_dir, name=path, **options)


@pytest.mark.parametrize("path", ["map", "iter"])
def test_the_filter_keeps_exactly_the_best_windows_of_every_block(world, tmp_path, path):
    _, _, scorer = world
    mgf.Registry(tmp_path).publish(scorer)
    kept = [int(element["index"]) for element in filtered(tmp_path, path, count=190)]
    scores, ratio = scorer.score(FRESH[:190]), Fraction(3, 10)
    for start in range(0, 190, 40):
        stop = min(start + 40, 190)
        k = kept_before(stop, ratio) - kept_before(start, ratio)
        best = sorted(range(start, stop), key=lambda i: (-scores[i], i))[:k]
        assert [i for i in kept if start <= i < stop] == sorted(best)
    dropped = np.setdiff1d(np.arange(190), kept)
    assert WORTH[FRESH_KIND[kept]].mean() > WORTH[FRESH_KIND[dropped]].mean() + 0.8


@pytest.mark.parametrize("path", ["map", "iter"])
def test_a_resumed_filter_goes_on_where_it_was(world, tmp_path, path):
    registry = mgf.Registry(tmp_path)
    registry.publish(world[2])
    ds = filtered(tmp_path, path)
    if path == "map":
        ds = ds.to_iter_dataset(IN_PROCESS)
    iterator = iter(ds)
    for _ in range(17):
        next(iterator)
    state = iterator.get_state()
    rest = [int(element["index"]) for element in iterator]
    registry.publish(make_series_scorer(3))
    resumed = iter(ds)
    resumed.set_state(state)
    assert [int(element["index"]) for element in resumed] == rest and rest


def test_masks_and_missing_values_reach_the_scorer(world, tmp_path):
    _, _, scorer = world
    mgf.Registry(tmp_path).publish(scorer)
    observed = np.isfinite(FRESH[:80])
    elements = [{"values": np.nan_to_num(w), "seen": m} for w, m in zip(FRESH[:80], observed)]
    ds = mgf.score_filter(
        grain.MapDataset.source(elements),
        tmp_path,
        keep_ratio=0.5,
        block_windows=40,
        windows=mgf.SeriesWindows("values", "seen"),
        annotate=True,
    )
    expected = scorer.score(FRESH[:80])
    for element in ds:
        assert np.float32(element["score"]) in expected


def test_a_text_filter_refuses_a_series_scorer(world, tmp_path):
    mgf.Registry(tmp_path).publish(world[2])
    ds = grain.MapDataset.source([{"tokens": np.arange(4)}] * 10)
    ds = mgf.score_filter(ds, tmp_path, keep_ratio=0.5, windows=mgf.TextWindows("tokens"))
    with pytest.raises(ConfigError, match="series"):
        ds[0]

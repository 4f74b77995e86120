"""The scorer's numbers: native equals reference bit for bit, whatever the batch."""

import importlib
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hotlane import VOCAB, make_scorer, make_windows
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.scorer import features
from metagrad_filter.scorer.scorer import Scorer
from metagrad_filter.windows import SeriesWindows, TextWindows

bag = importlib.import_module("metagrad_filter.kernels.scorer")


@given(
    n=st.integers(0, 40),
    length=st.integers(1, 40),
    width=st.sampled_from([1, 2, 5]),
    bits=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
    pad=st.sampled_from([None, 0, 7, -1]),
)
def test_native_equals_reference_bit_for_bit(n, length, width, bits, seed, pad):
    assert bag.native_available()
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(1 << bits, width)).astype(np.float32)
    windows = rng.integers(0, 9, (n, length)).astype(np.int32)
    if pad == -1:
        windows[rng.random(windows.shape) < 0.3] = -1
    reference = features.ngram_mean(table, windows, bits=bits, hash_seed=seed, pad_id=pad)
    native = bag.ngram_mean(table, windows, bits=bits, hash_seed=seed, vocab_size=9, pad_id=pad)
    assert native.dtype == np.float64 and native.shape == (n, width)
    assert native.tobytes() == reference.tobytes()


def test_the_hash_never_changes():
    # Golden values: a change here silently invalidates every published scorer.
    rows = features.ngram_rows(np.array([[0, 1, 2, 50256]], np.int32), bits=20, hash_seed=1)
    assert rows.tolist() == HASH_GOLDEN


def test_hash_spreads_over_the_table():
    rows = features.ngram_rows(
        np.arange(2**15, dtype=np.int32).reshape(-1, 2), bits=12, hash_seed=5
    )
    for column in rows.T:
        counts = np.bincount(column, minlength=4096)
        # 2^14 items in 4096 rows: Poisson(4); 20 in one row has probability below 1e-8.
        assert counts.max() < 20 and (counts == 0).mean() < 0.03


def test_any_integer_dtype_scores_alike():
    windows = make_windows(5)
    for dtype in (np.int64, np.uint16, np.uint8):
        np.testing.assert_array_equal(
            make_scorer().score(windows.astype(dtype)), make_scorer().score(windows)
        )
    with pytest.raises(WindowError, match="int32"):
        make_scorer().score(np.array([[2**31]]))


def test_absent_ngrams_are_left_out_of_the_mean():
    table = np.arange(16, dtype=np.float32)[:, None]
    with_pad = np.array([[3, 4, 9, 9]], np.int32)
    without = np.array([[3, 4]], np.int32)
    options = {"bits": 4, "hash_seed": 2}
    assert features.ngram_mean(table, with_pad, pad_id=9, **options) == features.ngram_mean(
        table, without, **options
    )
    only_pad = np.full((1, 4), 9, np.int32)
    assert features.ngram_mean(table, only_pad, pad_id=9, **options) == 0.0


@pytest.mark.parametrize("deep", [False, True])
def test_a_score_does_not_depend_on_its_batch(deep):
    scorer = make_scorer(3, deep=deep)
    windows = make_windows(300)
    together = scorer.score(windows)
    assert together.dtype == np.float32 and together.shape == (300,)
    alone = np.concatenate([scorer.score(windows[i : i + 1]) for i in range(300)])
    thirds = np.concatenate([scorer.score(part) for part in np.split(windows, [7, 111, 112])])
    assert together.tobytes() == alone.tobytes() == thirds.tobytes()


def test_the_deep_score_is_its_formula():
    scorer = make_scorer(4, deep=True)
    windows = make_windows(20)
    linear = features.ngram_mean(scorer.linear[:, None], windows, bits=6, hash_seed=4)[:, 0]
    assert scorer.embedding is not None and scorer.embedding_bits == 5
    mean = features.ngram_mean(scorer.embedding, windows, bits=5, hash_seed=4)
    hidden = np.maximum(mean @ scorer.hidden_kernel + scorer.hidden_bias, 0)
    expected = scorer.bias + linear + hidden @ scorer.output_kernel
    np.testing.assert_allclose(scorer.score(windows), expected, rtol=1e-5)


def test_an_empty_batch_scores_to_nothing():
    for deep in (False, True):
        assert make_scorer(deep=deep).score(np.zeros((0, 5), np.int32)).shape == (0,)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31 - 1, -(2**31)])
def test_ids_out_of_range_name_the_window_and_the_id(monkeypatch, native, bad):
    if not native:
        monkeypatch.setenv(bag.NO_NATIVE, "1")
    windows = make_windows(5)
    windows[3, 2] = bad
    with pytest.raises(WindowError, match=rf"Window 3 .* id {bad} at position 2"):
        make_scorer().score(windows)


def test_padding_may_lie_outside_the_vocabulary():
    windows = make_windows(5)
    padded = windows.copy()
    padded[:, 10:] = -100
    scorer = make_scorer(pad_id=-100)
    np.testing.assert_array_equal(scorer.score(padded), make_scorer().score(windows[:, :10]))
    np.testing.assert_array_equal(make_scorer().score(padded, pad_id=-100), scorer.score(padded))
    with pytest.raises(WindowError, match="-100"):
        scorer.score(padded, pad_id=None)


@pytest.mark.parametrize(
    "windows",
    [np.zeros(3, np.int32), np.zeros((3, 0), np.int32), np.zeros((3, 2)), np.zeros((1, 1, 1))],
)
def test_unreadable_windows_are_refused(windows):
    with pytest.raises(WindowError):
        make_scorer().score(windows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "image"}, "kind"),
        ({"bits": 0}, "bits"),
        ({"bits": True}, "bits"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hash_seed": -1}, "hash_seed"),
        ({"pad_id": 1.5}, "pad_id"),
        ({"bias": math.nan}, "bias"),
        ({"bias": math.inf}, "bias"),
        ({"strength": -1.0}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"metadata": []}, "metadata"),
        ({"linear": np.zeros(64)}, "linear"),
        ({"linear": np.zeros(65, np.float32)}, "linear"),
        ({"linear": np.full(64, np.nan, np.float32)}, "NaN"),
        ({"embedding": np.zeros((4, 2), np.float32)}, "lacks"),
    ],
)
def test_fields_out_of_their_domain_are_refused(fields, message):
    base = {"vocab_size": 10, "bits": 6, "hash_seed": 0, "linear": np.zeros(64, np.float32)}
    with pytest.raises(ConfigError, match=message):
        Scorer(**(base | fields))


def test_native_code_checks_sizes_before_it_reads():
    native = importlib.import_module("metagrad_filter.kernels.scorer._ngram_bag")
    table, windows = np.zeros((16, 1), np.float32), np.zeros((1, 4), np.int32)
    for arguments in [
        (table, windows, 5, 0, None, 10),
        (table, windows, 25, 0, None, 10),
        (table, windows, 0, 0, None, 10),
        (table[:, :0], windows, 4, 0, None, 10),
        (table[:, 0], windows, 4, 0, None, 10),
        (table, windows[:, :0], 4, 0, None, 10),
        (table, windows[0], 4, 0, None, 10),
        (table, windows, 4, 0, None, 0),
    ]:
        with pytest.raises(ValueError):
            native.ngram_mean(*arguments)
    with pytest.raises(TypeError):
        native.ngram_mean(table.astype(np.float64), windows, 4, 0, None, 10)
    with pytest.raises(TypeError):
        native.ngram_mean(table, windows.astype(np.int64), 4, 0, None, 10)


def test_without_the_native_library_scores_are_the_same_after_one_warning():
    program = """
import json, sys, warnings
sys.modules["metagrad_filter.kernels.scorer._ngram_bag"] = None
from hotlane import make_scorer, make_windows
from metagrad_filter.kernels import scorer as bag
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    scores = [make_scorer(3).score(make_windows(20)) for _ in range(3)]
print(json.dumps([len(caught), bag.fallback_calls, bag.native_available(), scores[2].tolist()]))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=True,
    )
    warned, calls, available, scores = json.loads(run.stdout)
    assert (warned, calls, available) == (1, 3, False)
    assert scores == make_scorer(3).score(make_windows(20)).tolist()


def test_the_reference_can_be_chosen_silently(monkeypatch):
    monkeypatch.setenv(bag.NO_NATIVE, "1")
    before = bag.fallback_calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_scorer().score(make_windows(2))
    assert not bag.native_available() and bag.fallback_calls == before


def test_text_windows_stack_what_loaders_deliver():
    for dtype in (np.int32, np.int64, np.uint16, np.uint64):
        stacked = TextWindows("t").stack([{"t": np.array([1, 2], dtype)}] * 3)
        assert stacked.dtype == np.int32 and stacked.shape == (3, 2)
    assert TextWindows().stack([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert (TextWindows().kind, SeriesWindows().kind) == ("text", "series")


@pytest.mark.parametrize(
    ("windows", "elements", "message"),
    [
        (TextWindows("t"), [{"x": [1], "y": [1]}], r"no key 't', available: \['x', 'y'\]"),
        (TextWindows("t"), [[1, 2]], "expected a dict"),
        (TextWindows(), [{"x": [1]}], "key="),
        (TextWindows(), [[1, 2], [1]], "equal lengths"),
        (TextWindows(), [[1.5, 2.0]], "integer"),
        (TextWindows(), [[True, False]], "integer"),
        (TextWindows(), [["a", "b"]], "integer"),
        (TextWindows(), [[[1, 2]]], "shape"),
        (TextWindows(), [[[1, 2], [3]]], "not an array"),
        (TextWindows(), [[]], "empty"),
        (TextWindows(), [3], "shape"),
        (TextWindows(), [], "no windows"),
        (TextWindows(), [[2**31, 1]], "int32"),
        (SeriesWindows(), [np.zeros(4)], "shape"),
        (SeriesWindows(), [np.zeros((4, 0))], "empty"),
        (SeriesWindows(), [np.array([["a"]])], "numbers"),
        (SeriesWindows("v", "m"), [{"v": np.zeros((4, 2)), "m": np.ones(3, bool)}], "Mask 0"),
        (SeriesWindows("v", "m"), [{"v": np.zeros((4, 2))}], "no key 'm'"),
    ],
)
def test_unreadable_elements_say_what_to_do(windows, elements, message):
    with pytest.raises(WindowError, match=message):
        windows.stack(elements)


def test_series_windows_mark_missing_values():
    values = np.arange(8.0).reshape(4, 2)
    mask = np.array([True, False, True, True])
    stacked = SeriesWindows("v", "m").stack([{"v": values, "m": mask}])
    assert stacked.dtype == np.float32 and stacked.shape == (1, 4, 2)
    assert np.isnan(stacked[0, 1]).all() and np.isnan(stacked).sum() == 2
    assert values[1, 0] == 2.0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TextWindows, {"key": 3}),
        (TextWindows, {"pad_id": True}),
        (TextWindows, {"pad_id": 2**31}),
        (SeriesWindows, {"mask_key": "m"}),
    ],
)
def test_window_options_out_of_their_domain_are_refused(kind, options):
    with pytest.raises(ConfigError):
        kind(**options)


HASH_GOLDEN = [[428185, 181320, 316806, 341713, 685340, 263931, 696480]]

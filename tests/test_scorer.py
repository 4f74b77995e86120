"""The scorer's numbers: every instruction set and numpy give the same bits, whatever the batch."""

import importlib
import json
import math
import pickle
import subprocess
import sys
import threading
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
loading = importlib.import_module("metagrad_filter.kernels.scorer.loading")
reference = importlib.import_module("metagrad_filter.kernels.scorer.ngram_reference")
native = importlib.import_module("metagrad_filter.kernels.scorer._ngram_bag")


def native_scores(scorer: Scorer, windows, pad_id, isa: str) -> np.ndarray:
    m = scorer._model()
    hidden = (m.hidden_kernel, m.hidden_bias, m.output_kernel)
    handle = native.NgramScorer(
        m.table, m.vocab_size, m.hash_seed, m.bits, m.orders, m.scale, m.skip, *hidden, m.bias, isa
    )
    assert handle.isa == isa
    return handle.score(windows, pad_id)


def plain_scores(scorer: Scorer, windows, pad_id) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64, n-gram by n-gram, and the size of what is added up."""
    table = scorer.table.astype(np.float64) * scorer.scale
    rows = features.ngram_rows(
        windows, bits=scorer.bits, hash_seed=scorer.hash_seed, orders=scorer.orders
    )
    present = features.present_ngrams(windows, pad_id, orders=scorer.orders)
    count = np.maximum(present.sum(axis=1), 1)[:, None]
    mean = (table[rows] * present[..., None]).sum(axis=1) / count
    sizes = (abs(table)[rows] * present[..., None]).sum(axis=1) / count
    score = scorer.bias + mean @ scorer.skip
    size = abs(scorer.bias) + sizes @ abs(scorer.skip)
    if scorer.hidden_kernel is not None:
        parts = scorer.tensors()
        kernel, bias = parts["hidden_kernel"], parts["hidden_bias"]
        output = parts["output_kernel"]
        score += np.maximum(mean @ kernel + bias, 0) @ output
        size += (sizes @ abs(kernel) + abs(bias)) @ abs(output)
    return score, size


@st.composite
def cases(draw):
    """A scorer, windows and a padding id."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    width = draw(st.sampled_from([1, 1, 2, 5, 16, 17, 32, 64, 80]))
    dtype = draw(st.sampled_from(["int8", "float16", "float32"]))
    hidden = draw(st.sampled_from([0, 1, 8, 33]))
    bits, orders = draw(st.integers(1, 10)), draw(st.integers(1, 3))

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    table = (normal(1 << bits, width) * 50).clip(-128, 127).astype(dtype)
    parts = {"skip": normal(width), "bias": float(rng.normal())}
    if dtype == "int8":
        parts["scale"] = rng.uniform(0.01, 2, width).astype(np.float32)
    if hidden:
        parts |= {
            "hidden_kernel": normal(width, hidden),
            "hidden_bias": normal(hidden),
            "output_kernel": normal(hidden),
        }
    scorer = Scorer(9, seed, table, orders=orders, **parts)
    # Around 256 n-grams the int8 sums change from one block to the next.
    length = draw(st.integers(1, 40) | st.sampled_from([128, 129, 300]))
    windows = rng.integers(0, 9, (draw(st.integers(0, 12)), length)).astype(np.int32)
    pad = draw(st.sampled_from([None, 0, 7, -1]))
    if pad == -1:
        windows[rng.random(windows.shape) < 0.3] = -1
    return scorer, windows, pad


@given(cases())
def test_every_instruction_set_equals_the_reference_bit_for_bit(case):
    scorer, windows, pad = case
    expected = reference.score(scorer._model(), windows, pad_id=pad)
    assert expected.dtype == np.float32 and expected.shape == (len(windows),)
    assert native.available_isas()[-1] == "portable"
    for isa in native.available_isas():
        assert native_scores(scorer, windows, pad, isa).tobytes() == expected.tobytes(), isa
    assert bag.native_available()
    assert scorer.score(windows, pad_id=pad).tobytes() == expected.tobytes()


@given(cases())
def test_a_score_is_its_formula(case):
    scorer, windows, pad = case
    expected, size = plain_scores(scorer, windows, pad)
    error = abs(scorer.score(windows, pad_id=pad) - expected)
    # int8 sums are exact; a float32 sum of n terms rounds n times, by half a unit at most.
    terms = 0 if scorer.table.dtype == np.int8 else scorer.orders * windows.shape[1] / 2
    assert (error <= (1e-6 + terms * 2.0**-24) * size).all()


def test_values_at_the_edges_of_the_dtypes_give_the_same_bits():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    half = np.where(np.isfinite(half), half, np.float16(0)).astype(np.float16)
    tiny = np.float32(1e-45) * np.arange(2**16, dtype=np.float32)
    huge = np.full(2**16, 3e38, np.float32)
    lowest = np.full(2**16, -128, np.int8)
    windows = np.random.default_rng(0).integers(0, VOCAB, (40, 300)).astype(np.int32)
    for values in (half, tiny, huge, lowest):
        for width in (1, 16, 64):
            table = np.ascontiguousarray(values.reshape(-1, width))
            scorer = Scorer(VOCAB, 1, table)
            expected = reference.score(scorer._model(), windows)
            for isa in native.available_isas():
                found = native_scores(scorer, windows, None, isa)
                assert found.tobytes() == expected.tobytes(), (values.dtype, width, isa)
    assert np.isposinf(expected).sum() == 0
    assert np.isposinf(Scorer(VOCAB, 1, huge[:, None]).score(windows)).all()


def test_large_tables_give_the_same_bits():
    # 16 MiB: on pages of its own, where the system has larger ones.
    rng = np.random.default_rng(0)
    scorer = Scorer(VOCAB, 1, rng.integers(-128, 128, (2**19, 32)).astype(np.int8))
    windows = make_windows(50, 100)
    expected = reference.score(scorer._model(), windows)
    for isa in native.available_isas():
        assert native_scores(scorer, windows, None, isa).tobytes() == expected.tobytes()


def test_threads_that_share_a_scorer_get_the_same_bits():
    scorer, windows = make_scorer(2, deep=True), make_windows(200, 50)
    expected = scorer.score(windows).tobytes()
    found = []

    def work():
        found.extend(scorer.score(windows).tobytes() for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and set(found) == {expected}


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_the_instruction_set_can_be_chosen(monkeypatch, isa):
    monkeypatch.setenv(bag.ISA, isa)
    if isa not in native.available_isas():
        with pytest.raises(ConfigError, match=f"{isa}.*expected one of"):
            make_scorer().score(make_windows(2))
        pytest.skip(f"this processor has no {isa}")
    assert bag.isa() == isa
    scores = make_scorer().score(make_windows(2))
    monkeypatch.delenv(bag.ISA)
    assert bag.isa() == native.available_isas()[0] == bag.available_isas()[0]
    assert scores.tobytes() == make_scorer().score(make_windows(2)).tobytes()


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(bag.ISA, "avx1024")
    with pytest.raises(ConfigError, match="METAGRAD_FILTER_ISA is 'avx1024', expected one of"):
        make_scorer().score(make_windows(2))
    with pytest.raises(ValueError, match="'avx1024' is not one of"):
        native_scores(make_scorer(), make_windows(2), None, "avx1024")


def test_the_hash_never_changes():
    # Golden values: a change here silently invalidates every published scorer.
    rows = features.ngram_rows(np.array([[0, 1, 2, 50256]], np.int32), bits=20, hash_seed=1)
    assert rows.tolist() == HASH_GOLDEN
    rows = features.ngram_rows(
        np.array([[0, 1, 2, 50256]], np.int32), bits=20, hash_seed=1, orders=3
    )
    assert rows.tolist() == [HASH_GOLDEN[0] + TRIGRAM_GOLDEN]


def test_hash_spreads_over_the_table():
    rows = features.ngram_rows(
        np.arange(3 * 2**14, dtype=np.int32).reshape(-1, 3), bits=12, hash_seed=5, orders=3
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


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_absent_ngrams_are_left_out_of_the_mean(orders):
    scorer = Scorer(10, 2, np.arange(16, dtype=np.float32)[:, None], orders=orders, bias=0.5)
    with_pad = np.array([[3, 4, 9, 9]], np.int32)
    without = np.array([[3, 4]], np.int32)
    assert scorer.score(with_pad, pad_id=9) == scorer.score(without)
    only_pad = np.full((1, 4), 9, np.int32)
    assert scorer.score(only_pad, pad_id=9) == 0.5


def test_orders_are_unigrams_bigrams_and_trigrams():
    window = np.array([[5, 5, 5, 6]], np.int32)
    for orders, distinct in ((1, 2), (2, 4), (3, 6)):
        rows = features.ngram_rows(window, bits=24, hash_seed=0, orders=orders)
        assert rows.shape == (1, features.count_ngrams(4, orders))
        assert len(set(rows[0])) == distinct
    for length, counts in ((1, (1, 1, 1)), (2, (2, 3, 3)), (3, (3, 5, 6))):
        short = window[:, :length]
        for orders, count in zip((1, 2, 3), counts):
            assert features.ngram_rows(short, bits=4, hash_seed=0, orders=orders).size == count
            assert features.present_ngrams(short, 6, orders=orders).size == count


@pytest.mark.parametrize("deep", [False, True])
def test_a_score_does_not_depend_on_its_batch(deep):
    scorer = make_scorer(3, deep=deep)
    windows = make_windows(300)
    together = scorer.score(windows)
    assert together.dtype == np.float32 and together.shape == (300,)
    alone = np.concatenate([scorer.score(windows[i : i + 1]) for i in range(300)])
    thirds = np.concatenate([scorer.score(part) for part in np.split(windows, [7, 111, 112])])
    assert together.tobytes() == alone.tobytes() == thirds.tobytes()


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
    for dtype, tolerance in (("int8", 0), ("float32", 1e-6)):
        scorer = make_scorer(pad_id=-100).quantized(dtype)
        short = make_scorer().quantized(dtype).score(windows[:, :10])
        np.testing.assert_allclose(scorer.score(padded), short, rtol=0, atol=tolerance)
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
        ({"orders": 0}, "orders"),
        ({"orders": 4}, "orders"),
        ({"orders": True}, "orders"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hash_seed": -1}, "hash_seed"),
        ({"pad_id": 1.5}, "pad_id"),
        ({"bias": math.nan}, "bias"),
        ({"bias": math.inf}, "bias"),
        ({"strength": -1.0}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"metadata": []}, "metadata"),
        ({"bias": 10**400}, "bias"),
        ({"table": np.zeros((64, 1))}, "table is float64"),
        ({"table": [[0.0]]}, "table is list"),
        ({"table": np.zeros(64, np.float32)}, "table"),
        ({"table": np.zeros((65, 1), np.float32)}, r"\(65, 1\)"),
        ({"table": np.zeros((1, 1), np.int8)}, r"\(1, 1\)"),
        ({"table": np.zeros((0, 1), np.int8)}, r"\(0, 1\)"),
        ({"table": np.zeros((64, 0), np.int8)}, r"\(64, 0\)"),
        ({"table": np.full((64, 1), np.nan, np.float32)}, "NaN"),
        ({"table": np.full((64, 1), np.inf, np.float16)}, "NaN"),
        ({"scale": np.ones(2, np.float32)}, "scale"),
        ({"scale": np.full(1, 2, np.float32)}, "scale is given with a float32 table"),
        ({"skip": np.ones(1)}, "skip is float64"),
        ({"hidden_bias": np.zeros(2, np.float32)}, "lacks"),
        (
            {
                "hidden_kernel": np.zeros((2, 2), np.float32),
                "hidden_bias": np.zeros(2, np.float32),
                "output_kernel": np.zeros(2, np.float32),
            },
            r"hidden_kernel is float32\(2, 2\), expected a float32 array of shape \(1, 2\)",
        ),
        (
            {
                "hidden_kernel": np.zeros((1, 0), np.float32),
                "hidden_bias": np.zeros(0, np.float32),
                "output_kernel": np.zeros(0, np.float32),
            },
            "hidden_bias is empty",
        ),
    ],
)
def test_fields_out_of_their_domain_are_refused(fields, message):
    base = {"vocab_size": 10, "hash_seed": 0, "table": np.zeros((64, 1), np.float32)}
    with pytest.raises(ConfigError, match=message):
        Scorer(**(base | fields))


def test_native_code_checks_sizes_before_it_reads():
    one = np.ones(1, np.float32)
    good = {
        "table": np.zeros((16, 1), np.float32), "vocab_size": 10, "hash_seed": 0, "bits": 4,
        "orders": 2, "scale": one, "skip": one, "hidden_kernel": None, "hidden_bias": None,
        "output_kernel": None, "bias": 0.0, "isa": "",
    }  # fmt: skip
    handle = native.NgramScorer(**good)
    two = np.ones((2, 2), np.float32)
    for changes in [
        {"bits": 5},
        {"bits": 25},
        {"bits": 0},
        {"orders": 0},
        {"orders": 4},
        {"vocab_size": 0},
        {"table": good["table"][:, 0]},
        {"table": good["table"][:, :0], "scale": one[:0], "skip": one[:0]},
        {"table": np.zeros((16, 2), np.float32)[:, ::2]},
        {"scale": np.ones(2, np.float32)},
        {"skip": np.ones(2, np.float32)},
        {"hidden_kernel": two, "hidden_bias": two[0], "output_kernel": two[0]},
        {"hidden_kernel": two[:1], "hidden_bias": two[0], "output_kernel": two[0, :1]},
        {"isa": "sse9"},
    ]:
        with pytest.raises(ValueError):
            native.NgramScorer(**(good | changes))
    for changes in [{"table": np.zeros((16, 1))}, {"table": np.zeros((16, 1), np.int32)}]:
        with pytest.raises(TypeError):
            native.NgramScorer(**(good | changes))
    windows = np.zeros((1, 4), np.int32)
    for odd in (windows[:, :0], windows[0]):
        with pytest.raises(ValueError):
            handle.score(odd, None)
    for odd in (windows.astype(np.int64), np.zeros((1, 8), np.int32)[:, ::2]):
        with pytest.raises(TypeError):
            handle.score(odd, None)


def test_windows_that_are_too_long_are_refused():
    long = np.zeros((1, features.MAX_LENGTH + 1), np.int32)
    for scorer in (make_scorer(), make_scorer(table=np.zeros((64, 1), np.int8))):
        with pytest.raises(WindowError, match="4194305"):
            scorer.score(long)
    assert make_scorer().score(long[:, 1:]).shape == (1,)


def test_strided_and_read_only_windows_score_alike():
    windows = make_windows(6, 20)
    expected = make_scorer().score(np.ascontiguousarray(windows[::2, ::2]))
    windows.flags.writeable = False
    assert make_scorer().score(windows[::2, ::2]).tobytes() == expected.tobytes()
    swapped = windows[::2, ::2].astype(">i4")
    assert make_scorer().score(swapped).tobytes() == expected.tobytes()


def test_arrays_cannot_change_under_a_scorer():
    table = np.ones((64, 1), np.float32)
    scorer = make_scorer(table=table)
    with pytest.raises(ValueError, match="read-only"):
        scorer.table[0] = 2
    table[0] = 1  # the caller's own array stays writable


@pytest.mark.parametrize("deep", [False, True])
def test_a_scorer_survives_pickling(deep):
    scorer = make_scorer(3, deep=deep, strength=0.5, pad_id=4)
    scorer.score(make_windows(2))
    copy = pickle.loads(pickle.dumps(scorer))
    assert copy.score(make_windows(20)).tobytes() == scorer.score(make_windows(20)).tobytes()
    assert (copy.strength, copy.pad_id, copy.metadata) == (0.5, 4, {"seed": 3})


def test_rounding_gives_the_dtype_asked_for_and_says_what_it_cannot():
    scorer = make_scorer(deep=True)
    for dtype in ("int8", "float16", "float32"):
        rounded = scorer.quantized(dtype)
        assert rounded.table.dtype == dtype
        np.testing.assert_allclose(
            rounded.score(make_windows(50)), scorer.score(make_windows(50)), rtol=0.1, atol=0.1
        )
    assert scorer.quantized("float32") is scorer
    back = scorer.quantized("int8").quantized("float32")
    np.testing.assert_allclose(
        back.score(make_windows(50)), scorer.quantized("int8").score(make_windows(50)), rtol=1e-5
    )
    with pytest.raises(ConfigError, match="'int4', expected one of int8"):
        scorer.quantized("int4")
    with pytest.raises(ConfigError, match=r"frequencies have shape \(3,\)"):
        scorer.quantized("int8", frequencies=np.ones(3))
    with pytest.raises(ConfigError, match="NaN or inf"):
        make_scorer(table=np.full((64, 1), 1e6, np.float32)).quantized("float16")
    zeros = make_scorer(table=np.zeros((64, 1), np.float32)).quantized("int8")
    assert zeros.score(make_windows(2)).tolist() == [0.25, 0.25]


def test_native_code_that_fails_is_replaced_once(monkeypatch):
    scorer, windows = make_scorer(3), make_windows(20)
    expected = scorer.score(windows)
    calls = []

    def failing(windows, pad_id):
        calls.append(1)
        raise RuntimeError("illegal instruction")

    loading.warn.cache_clear()
    monkeypatch.setattr(scorer._kernel, "_native", failing)
    before = bag.fallback_calls
    with pytest.warns(RuntimeWarning, match=r"failed \(RuntimeError: illegal instruction\)"):
        assert scorer.score(windows).tobytes() == expected.tobytes()
    assert scorer.score(windows).tobytes() == expected.tobytes()
    assert (len(calls), bag.fallback_calls - before) == (1, 2)


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
TRIGRAM_GOLDEN = [609450, 655845]

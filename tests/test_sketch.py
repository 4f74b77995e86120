"""Sketches add exactly and say what numpy says of the same scores."""

import math

import numpy as np
import pytest
from hotlane import make_scorer
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.blockstats import BlockStatistics, read_records
from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.monitor.sketch import ScoreSketch, references
from metagrad_filter.registry import Registry

REFERENCE = np.quantile(np.random.default_rng(0).normal(size=4096), np.linspace(0, 1, 257)).tolist()

scores = st.lists(st.floats(-100, 100, width=32), max_size=50).map(
    lambda values: np.array(values, np.float32)
)


@given(scores, scores)
def test_adding_sketches_is_sketching_all(a, b):
    added = ScoreSketch.of(a, REFERENCE) + ScoreSketch.of(b, REFERENCE)
    whole = ScoreSketch.of(np.concatenate([a, b]), REFERENCE)
    assert added.bins == whole.bins and added.count == len(a) + len(b)
    assert (added.minimum, added.maximum) == (whole.minimum, whole.maximum)
    assert added.mean == pytest.approx(whole.mean, abs=1e-9)
    assert added.m2 == pytest.approx(whole.m2, rel=1e-9, abs=1e-6)


@given(scores, scores, scores)
def test_the_order_of_adding_does_not_change_counts(a, b, c):
    x, y, z = (ScoreSketch.of(v, REFERENCE) for v in (a, b, c))
    assert ((x + y) + z).bins == (x + (y + z)).bins == ((z + x) + y).bins


def test_the_reference_sample_fills_all_bins_alike():
    sample = np.random.default_rng(0).normal(size=4096)
    bins = ScoreSketch.of(sample, REFERENCE).bins
    assert min(bins) >= 63 and max(bins) <= 65


def test_moments_are_those_of_numpy():
    values = np.random.default_rng(1).normal(3, 2, 1000).astype(np.float32)
    sketch = ScoreSketch.of(values, REFERENCE)
    assert sketch.mean == pytest.approx(values.astype(np.float64).mean())
    assert sketch.deviation == pytest.approx(values.astype(np.float64).std(ddof=1))
    assert ScoreSketch.of(values[:1], REFERENCE).deviation == 0


def test_a_record_and_its_sketch_are_the_same(tmp_path):
    scorer = make_scorer(metadata={"reference": REFERENCE})
    statistics = BlockStatistics(tmp_path, "t")
    values = np.random.default_rng(2).normal(size=300).astype(np.float32)
    kept = np.argsort(values)[-75:]
    statistics.block(block=0, version=1, scorer=scorer, scores=values, kept=kept)
    statistics.flush()
    (record,) = read_records(tmp_path, "t")
    sketch = ScoreSketch.from_record(record)
    expected = ScoreSketch.of(values, REFERENCE)
    assert sketch is not None and sketch.bins == expected.bins
    assert sketch.m2 == pytest.approx(expected.m2)
    assert sketch.to_record() == record["scores"] | {"kept_bins": None}
    chosen = ScoreSketch.from_record(record, kept=True)
    assert chosen is not None and chosen.bins == ScoreSketch.of(values[kept], REFERENCE).bins


def test_no_scores_are_no_sketch():
    assert ScoreSketch.from_record({"scores": None}) is None
    assert ScoreSketch.from_record({"scores": {"bins": None}}) is None
    empty = ScoreSketch.of(np.array([np.nan, np.inf], np.float32), REFERENCE)
    assert empty == ScoreSketch() and empty.to_record() is None


def test_bad_sketches_are_refused():
    with pytest.raises(DataError, match="expected 64 counts"):
        ScoreSketch((1,) * 63)
    with pytest.raises(DataError, match="expected 64 counts"):
        ScoreSketch((-1,) * 64)
    with pytest.raises(DataError, match="no moments of 64"):
        ScoreSketch((1,) * 64, mean=math.nan, minimum=0.0, maximum=1.0)
    with pytest.raises(ConfigError, match="ascending quantiles"):
        ScoreSketch.of(np.zeros(3), [2.0, 1.0])


def test_references_come_from_the_registry(tmp_path):
    registry = Registry(tmp_path)
    registry.publish(make_scorer(metadata={"reference": REFERENCE}))
    registry.publish(make_scorer(metadata={}))
    reference = references(tmp_path)
    assert reference(1) == REFERENCE
    assert [reference(version) for version in (-1, 0, 2, 3)] == [None] * 4

"""The monitor notices what changed, soon, and says nothing where nothing did."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.blockstats import bin_edges
from metagrad_filter.errors import ConfigError, StateMismatch
from metagrad_filter.monitor.alarms import Alarm, Monitor

BLOCK = 512


def reference_of(seed: int) -> list[float]:
    sample = np.random.default_rng([seed, 1]).normal(size=4096)
    return np.quantile(sample, np.linspace(0, 1, 257)).astype(np.float32).tolist()


def make_record(scores: np.ndarray, reference, *, sequence: int, **fields: Any) -> dict[str, Any]:
    """Returns the record of whole blocks whose windows have these scores."""
    scores = scores.astype(np.float32)
    wide = scores.astype(np.float64)
    n = len(scores)
    blocks = max(n // BLOCK, 1)
    edges = bin_edges(reference)
    assert edges is not None
    bins = np.bincount(edges.searchsorted(scores, side="right"), minlength=64).tolist()
    return {
        "format": 1,
        "name": "t",
        "session": "s",
        "sequence": sequence,
        "first_block": sequence * blocks,
        "last_block": sequence * blocks + blocks - 1,
        "blocks": blocks,
        "version": 1,
        "windows": n,
        "kept": n // 4,
        "uniform_blocks": 0,
        "seconds": 0.0,
        "time": 0.0,
        "scores": {
            "count": n,
            "mean": float(wide.mean()),
            "m2": float(((wide - wide.mean()) ** 2).sum()),
            "minimum": float(wide.min()),
            "maximum": float(wide.max()),
            "bins": bins,
            "kept_bins": None,
        },
        "threshold": None,
        "groups": {},
        "features": {},
    } | fields


def stream(seed: int, looks: int, change: Callable, *, at: int, blocks: int = 1, **fields: Any):
    """Yields records of a normal stream that `change` acts on from the look `at` on."""
    rng = np.random.default_rng(seed)
    for sequence in range(looks):
        scores = rng.normal(size=blocks * BLOCK)
        if sequence >= at:
            scores = change(scores)
        yield make_record(scores, reference_of(seed), sequence=sequence, **fields)


def same(scores):
    return scores


def watch(seed: int, **options: Any) -> Monitor:
    return Monitor(lambda version: reference_of(seed), **options)


@pytest.mark.parametrize("blocks", [1, 4, 8])
@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_a_shift_of_half_a_deviation_is_noticed_within_20_blocks(blocks, shift):
    for seed in range(5):
        monitor = watch(seed)
        records = list(stream(seed, 30, lambda s: s + shift, at=10, blocks=blocks))
        assert monitor.feed(records[:10]) == [] and not monitor.wants_round
        first = monitor.feed(records[10:])[0]
        assert first.state == "raised" and first.value > first.limit
        assert first.block - (records[10]["first_block"] - 1) <= 20
        assert monitor.wants_round


def test_the_worst_moment_for_a_shift_is_within_20_blocks_too():
    """The shift begins one block after a record of 8 blocks did, or one block before its end."""
    for seed, before in ((0, 1), (1, 6), (2, 7)):
        monitor = watch(seed)
        rng = np.random.default_rng(seed)
        found = []
        for sequence in range(4):
            scores = rng.normal(size=8 * BLOCK)
            scores[(before * BLOCK if sequence == 0 else 0) :] += 0.5
            found += monitor.feed([make_record(scores, reference_of(seed), sequence=sequence)])
        assert found and found[0].block - before < 20


@pytest.mark.parametrize("blocks", [1, 8])
def test_a_million_windows_without_a_change_raise_no_alarm(blocks):
    """Bins by multinomial draws whose shares are what a sample of 4096 leaves between quantiles."""
    looks = 10**6 // (blocks * BLOCK)
    rng = np.random.default_rng(blocks)
    reference = reference_of(0)
    shares = rng.dirichlet(np.full(64, 64))
    draws = rng.multinomial(blocks * BLOCK, shares, looks)
    means = rng.normal(0, 1 / np.sqrt(blocks * BLOCK), looks)
    monitor = watch(0, target_keep_ratio=0.25)
    plain = make_record(rng.normal(size=blocks * BLOCK), reference, sequence=0)
    findings = []
    for sequence in range(looks):
        scores = plain["scores"] | {
            "bins": draws[sequence].tolist(),
            "mean": float(means[sequence]),
        }
        place = {"first_block": sequence * blocks, "last_block": (sequence + 1) * blocks - 1}
        record = plain | place | {"sequence": sequence, "scores": scores}
        findings += monitor.feed([record])
    assert findings == [] and not monitor.wants_round
    assert set(monitor.current) == {"psi", "ks", "mean", "keep_ratio"}


@pytest.mark.parametrize("scale", [0.75, 1.25])
def test_a_change_of_scale_is_noticed_though_the_mean_stays(scale):
    monitor = watch(3)
    findings = monitor.feed(stream(3, 16, lambda s: s * scale, at=8, blocks=8))
    assert {f.kind for f in findings} >= {"psi"} and "mean" not in {f.kind for f in findings}
    assert monitor.wants_round


def test_an_alarm_clears_when_the_stream_comes_back():
    monitor = watch(4)
    rng = np.random.default_rng(4)
    findings = []
    for sequence in range(120):
        scores = rng.normal(0.5 if 10 <= sequence < 20 else 0.0, 1, BLOCK)
        findings += monitor.feed([make_record(scores, reference_of(4), sequence=sequence)])
    states = {kind: [f.state for f in findings if f.kind == kind] for kind in ("psi", "mean")}
    assert states == {"psi": ["raised", "cleared"], "mean": ["raised", "cleared"]}
    assert not monitor.wants_round


def test_a_new_version_starts_afresh_and_an_older_one_is_passed_over():
    monitor = watch(5)
    shifted = list(stream(5, 8, lambda s: s + 1, at=0))
    assert {f.state for f in monitor.feed(shifted)} == {"raised"} and monitor.wants_round
    rng = np.random.default_rng(5)
    swap = make_record(rng.normal(size=BLOCK), reference_of(5), sequence=8, version=2)
    findings = monitor.feed([swap])
    assert findings and {f.state for f in findings} == {"cleared"}
    assert monitor.version == 2 and not monitor.wants_round
    late = make_record(rng.normal(3, 1, BLOCK), reference_of(5), sequence=9, version=1)
    assert monitor.feed([late, late | {"sequence": 10}]) == []
    assert monitor.skipped == 2 and monitor.version == 2 and not monitor.wants_round


@given(st.integers(0, 29), st.booleans())
def test_a_restored_monitor_goes_on_as_if_never_stopped(cut, shift):
    records = _RECORDS[shift]
    whole = watch(6)
    expected = whole.feed(records)
    first = watch(6)
    findings = first.feed(records[:cut])
    second = watch(6)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    # Records that were read already are passed over.
    findings += second.feed(records)
    assert findings == expected
    assert second.state() == whole.state() and second.wants_round == whole.wants_round


_RECORDS = {
    shift: list(stream(6, 30, lambda s: s + 0.4 * shift, at=15, features={}))  # noqa: B023
    for shift in (False, True)
}


def test_small_records_are_added_up_before_they_are_judged():
    rng = np.random.default_rng(7)
    monitor = watch(7, min_windows=1000)
    for sequence in range(10):
        record = make_record(rng.normal(size=100), reference_of(7), sequence=sequence)
        monitor.feed([record])
        assert bool(monitor.current) == (sequence == 9)
    assert monitor.current["psi"].block == 9


def test_windows_that_come_in_clusters_count_as_fewer():
    """Sixteen windows of one document have one score: chance moves them like 1/16 as many."""
    wary, rash = watch(8, windows_per_sample=16), watch(8)
    rng = np.random.default_rng(8)
    for sequence in range(60):
        scores = np.repeat(rng.normal(size=256), 16)
        record = make_record(scores, reference_of(8), sequence=sequence)
        rash.feed([record])
        assert wary.feed([record]) == []
    assert rash.wants_round


def test_keep_ratio_age_and_agreement_have_alarms_of_their_own():
    monitor = watch(9, target_keep_ratio=0.25, max_age_blocks=20)
    records = list(stream(9, 24, same, at=0))
    for record in records[12:]:
        record["kept"] = record["windows"] // 3
    findings = monitor.feed(records)
    assert [(f.kind, f.block, f.state) for f in findings] == [
        ("keep_ratio", 13, "raised"),
        ("age", 20, "raised"),
    ]
    assert not monitor.wants_round
    assert monitor.agreement(24, 0.4, 0.2, 0.6) == []
    (finding,) = monitor.agreement(25, -0.1, -0.3, 0.05)
    assert (finding.kind, finding.state) == ("rank_agreement", "raised") and monitor.wants_round
    assert monitor.agreement(26, 0.4, 0.2, 0.6)[0].state == "cleared"


def test_a_feature_that_moves_is_noticed_and_asks_for_no_round():
    rng = np.random.default_rng(10)
    monitor = watch(10)
    findings = []
    for sequence in range(30):
        values = rng.normal(6.0 if sequence >= 20 else 0.0, 1, 8)
        moments = {
            "count": 8,
            "mean": float(values.mean()),
            "m2": float(((values - values.mean()) ** 2).sum()),
        }
        record = make_record(
            rng.normal(size=8 * BLOCK), reference_of(10), sequence=sequence,
            features={"loss": moments, "once": {"count": 1, "mean": 0.0, "m2": 0.0}},
        )  # fmt: skip
        findings += monitor.feed([record])
    assert [(f.kind, f.state) for f in findings] == [("feature:loss", "raised")]
    assert findings[0].block <= 23 * 8 and not monitor.wants_round


def test_uniform_records_and_versions_without_reference_are_watched_for_what_they_have():
    monitor = Monitor(target_keep_ratio=0.25)
    uniform = make_record(np.zeros(BLOCK), reference_of(0), sequence=0, version=0)
    uniform["scores"] = None
    assert monitor.feed([uniform]) == [] and set(monitor.current) == {"keep_ratio"}
    scored = make_record(np.random.default_rng(0).normal(size=BLOCK), reference_of(0), sequence=1)
    bare = scored | {"scores": scored["scores"] | {"bins": None}}
    assert monitor.feed([bare]) == [] and set(monitor.current) == {"keep_ratio"}


@given(st.lists(st.booleans(), max_size=30))
def test_an_alarm_is_raised_by_2_of_3_and_cleared_by_3_quiet_looks(looks):
    alarm, raised, since = Alarm(), False, 0
    for position, above in enumerate(looks):
        before = alarm.raised
        alarm = alarm.observe(above)
        window = looks[max(since, position - 2) : position + 1]
        raised = not (len(window) == 3 and not any(window)) if raised else sum(window) >= 2
        if raised != before:
            since = position + 1
        assert alarm.raised == raised


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0.5}, "level is 0.5"),
        ({"target_keep_ratio": 0}, "target_keep_ratio is 0"),
        ({"windows_per_sample": 0.5}, "windows_per_sample is 0.5"),
        ({"run_length": 1}, "run_length is 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Monitor(**options)
    with pytest.raises(ConfigError, match="needed is 4 of among 3"):
        Alarm(needed=4)
    with pytest.raises(ConfigError, match="low is 2"):
        Monitor().agreement(0, 0, 2, 1)
    record = make_record(np.zeros(BLOCK), reference_of(0), sequence=0)
    with pytest.raises(ConfigError, match=r"of filters \['t', 'u'\], expected one"):
        Monitor().feed([record, record | {"name": "u"}])


@pytest.mark.parametrize("state", [{}, {"format": 2}, {"format": 1}, {"format": 1, "version": 1}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(StateMismatch, match="cannot be read"):
        Monitor().restore(state)

"""A run that nobody watches: drift is followed and written down, rounds are asked for, breaks are
answered, and a restart loses and repeats nothing."""

import json
import os
import threading
import time
import urllib.request
import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from doctor_setups import proxy, upwards
from hotlane import make_scorer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_watch_mode import SMALL, looking, small, until

import metagrad_filter as mgf
from metagrad_filter.blockstats import BlockStatistics, read_records
from metagrad_filter.calibration import attend as module
from metagrad_filter.calibration.attend import Attendant
from metagrad_filter.calibration.metric_files import MetricTails
from metagrad_filter.calibration.monitoring import Monitoring
from metagrad_filter.calibration.reference import ReferencePool, agreement
from metagrad_filter.calibration.requests import reason_of, request_round, waiting_requests
from metagrad_filter.calibration.retreat import Retreat
from metagrad_filter.calibration.settings import Schedule
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.calibration.validation import record_validation
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.monitor.records import read_alarms
from metagrad_filter.store import open_store

BLOCK = 512
QUICK = Monitoring(again_blocks=8)


def reference_of(seed=0):
    sample = np.random.default_rng([seed, 1]).normal(size=4096)
    return np.quantile(sample, np.linspace(0, 1, 257)).astype(np.float32).astype(float).tolist()


def publish(run_dir, seed=1, **fields):
    metadata = {"reference": reference_of(), "reference_windows": 4096}
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields), metadata)


class Stream:
    """A filter's records, written as the hot lane writes them: scores are spread as the version's
    reference says, or normal where it has none."""

    def __init__(self, run_dir, name="train", version=1):
        self.run_dir, self.name, self.version, self.block = run_dir, name, version, 0
        self.rng = np.random.default_rng(7)
        self.statistics = BlockStatistics(run_dir, name, every_blocks=1)

    def go_on(self, blocks, shift=0.0):
        try:
            scorer = mgf.Registry(self.run_dir).load(self.version)
        except mgf.ScorerRejected:
            scorer = None
        reference = None if scorer is None else scorer.metadata.get("reference")
        for _ in range(blocks):
            scores = self.rng.normal(size=BLOCK)
            if reference is not None:
                levels = np.linspace(0, 1, len(reference))
                scores = np.interp(self.rng.random(BLOCK), levels, reference)
            scores = (scores + shift).astype(np.float32)
            self.statistics.block(
                block=self.block,
                version=self.version,
                scorer=scorer,
                scores=scores,
                kept=np.argsort(-scores)[: BLOCK // 4],
                groups={"source": ["web"] * 384 + ["code"] * 128},
            )
            self.block += 1
        self.statistics.flush()
        return self


def alarms(run_dir):
    found, damaged = read_alarms(open_store(run_dir))
    assert damaged == 0
    return found


def short(found):
    return [(a["filter"], a["version"], a["kind"], a["state"]) for a in found]


def reasons(run_dir):
    return [reason_of(path) for path in waiting_requests(run_dir)]


def serve_requests(run_dir):
    for path in waiting_requests(run_dir):
        path.unlink()


# Drift.


def test_drift_is_written_down_and_asked_about_once(tmp_path):
    publish(tmp_path)
    attendant = Attendant(tmp_path, QUICK, ask=True)
    assert attendant.look() == []  # nothing is there yet
    stream = Stream(tmp_path).go_on(20)
    assert attendant.look() == [] and alarms(tmp_path) == []
    assert not (tmp_path / "requests").exists()
    stream.go_on(6, shift=0.5)
    said = attendant.look()
    kinds = {a["kind"] for a in alarms(tmp_path)}
    assert kinds == {"psi", "ks", "mean"}
    assert all(a["state"] == "raised" and a["value"] > a["limit"] for a in alarms(tmp_path))
    assert all(20 <= a["block"] < 26 and a["version"] == 1 for a in alarms(tmp_path))
    assert len(said) == 4 and said[-1].startswith("asked for a round: drift of train: ")
    (asked,) = waiting_requests(tmp_path)
    assert json.loads(asked.read_bytes())["version"] == 1
    # Not once a look, however often it looks and however the request fares.
    stream.go_on(2, shift=0.5)
    assert attendant.look() == []
    serve_requests(tmp_path)
    assert attendant.look() == [] and waiting_requests(tmp_path) == []


def test_without_leave_to_ask_it_only_tells(tmp_path):
    publish(tmp_path)
    Stream(tmp_path).go_on(8, shift=0.5)
    assert len(Attendant(tmp_path, QUICK).look()) == 3
    assert not (tmp_path / "requests").exists()


def test_an_alarm_that_no_round_answered_asks_again_ever_less_often(tmp_path):
    publish(tmp_path)
    attendant = Attendant(tmp_path, Monitoring(again_blocks=4), ask=True)
    stream = Stream(tmp_path).go_on(3, shift=1.0)
    asked_at = []
    for _ in range(40):
        attendant.look()
        if waiting_requests(tmp_path):
            asked_at.append(stream.block)
            serve_requests(tmp_path)  # a round that published nothing
        stream.go_on(1, shift=1.0)
    first = asked_at[0]
    assert [at - first for at in asked_at] == [0, 4, 12, 28]


def test_a_version_with_a_successor_is_not_complained_of_and_the_next_starts_afresh(tmp_path):
    publish(tmp_path)
    stream = Stream(tmp_path).go_on(20)
    attendant = Attendant(tmp_path, QUICK, ask=True)
    attendant.look()
    publish(tmp_path, seed=2)
    stream.go_on(6, shift=0.5)
    attendant.look()
    assert alarms(tmp_path) and waiting_requests(tmp_path) == []
    # The filter takes up version 2, whose scores are as its reference says.
    stream.version = 2
    stream.go_on(6)
    attendant.look()
    assert sorted(short(alarms(tmp_path))[3:]) == [
        ("train", 1, kind, "cleared") for kind in ("ks", "mean", "psi")
    ]
    assert waiting_requests(tmp_path) == []


def test_a_damaged_successor_is_not_waited_for(tmp_path):
    publish(tmp_path)
    attendant = Attendant(tmp_path, QUICK, ask=True)
    publish(tmp_path, seed=2)
    (tmp_path / "registry" / "00000002.safetensors").write_bytes(b"")
    Stream(tmp_path).go_on(6, shift=0.5)
    attendant.look()
    assert len(waiting_requests(tmp_path)) == 1


def test_every_filter_has_its_monitor(tmp_path):
    publish(tmp_path)
    Stream(tmp_path, "calm").go_on(10)
    Stream(tmp_path, "wild").go_on(10, shift=0.5)
    attendant = Attendant(tmp_path, QUICK, ask=True)
    attendant.look()
    assert {a["filter"] for a in alarms(tmp_path)} == {"wild"}
    assert set(attendant.monitors) == {"calm", "wild"}
    assert len(reasons(tmp_path)) == 1 and "drift of wild" in reasons(tmp_path)[0]


def test_the_keep_ratio_is_compared_with_what_the_filter_has_recorded(tmp_path):
    publish(tmp_path)
    Stream(tmp_path, "train").go_on(8)
    Stream(tmp_path, "other").go_on(8)
    for name, ratio in (("train", "1/4"), ("other", "1/2")):
        folder = tmp_path / "ledger" / name
        folder.mkdir(parents=True)
        (folder / "filter.json").write_text(json.dumps({"keep_ratio": ratio}))
    attendant = Attendant(tmp_path, QUICK, ask=True)
    attendant.look()
    assert short(alarms(tmp_path)) == [("other", 1, "keep_ratio", "raised")]
    assert waiting_requests(tmp_path) == []  # no round answers that


DEATHS = ["none", "after a look", "before its state is stored", "in the midst of a line"]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.booleans(), st.sampled_from(DEATHS)),
        min_size=1,
        max_size=6,
    )
)
def test_a_process_that_dies_at_any_look_loses_and_repeats_nothing(tmp_path_factory, steps):
    run_dir, undisturbed = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("other")
    for folder in (run_dir, undisturbed):
        publish(folder)
    streams = [Stream(folder) for folder in (run_dir, undisturbed)]
    attendants = [Attendant(folder, QUICK, ask=True) for folder in (run_dir, undisturbed)]
    state, lines = run_dir / "monitor" / "state.json", run_dir / "monitor" / "alarms.jsonl"
    for blocks, drifted, death in steps:
        stored = state.read_bytes() if state.exists() else None
        written = lines.stat().st_size if lines.exists() else 0
        for stream, attendant in zip(streams, attendants, strict=True):
            stream.go_on(blocks, shift=0.7 * drifted)
            attendant.look()
        if death == DEATHS[3] and lines.exists() and lines.stat().st_size > written:
            os.truncate(lines, lines.stat().st_size - 9)
        if death in DEATHS[2:]:
            state.unlink() if stored is None else state.write_bytes(stored)
        if death != "none":
            attendants[0] = Attendant(run_dir, QUICK, ask=True)
    found = []
    for attendant, folder in zip(attendants, (run_dir, undisturbed), strict=True):
        attendant.look()
        kept = read_alarms(open_store(folder))[0]
        found.append([{n: v for n, v in alarm.items() if n != "time"} for alarm in kept])
    assert found[0] == found[1]
    assert [p.name for p in waiting_requests(run_dir)] == [
        p.name for p in waiting_requests(undisturbed)
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1}'])
def test_a_damaged_state_is_made_anew_and_no_line_is_written_twice(tmp_path, content):
    publish(tmp_path)
    Stream(tmp_path).go_on(20).go_on(6, shift=0.5)
    Attendant(tmp_path, QUICK, ask=True).look()
    before = alarms(tmp_path)
    (tmp_path / "monitor" / "state.json").write_bytes(content)
    with pytest.warns(RuntimeWarning, match="cannot be read .* made anew from the records"):
        attendant = Attendant(tmp_path, QUICK, ask=True)
    attendant.look()
    assert before and alarms(tmp_path) == before
    assert len(waiting_requests(tmp_path)) == 1


def test_a_full_disk_is_told_and_what_was_seen_is_written_later(tmp_path, monkeypatch):
    publish(tmp_path)
    Stream(tmp_path).go_on(6, shift=0.5)
    attendant = Attendant(tmp_path, QUICK)
    real, room = os.write, [30]

    def write(handle, data):
        taken = min(len(data), room[0])
        room[0] -= taken
        if not taken:
            raise OSError(28, "No space left on device")
        return real(handle, data[:taken])

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", write)
        for _ in range(3):
            with pytest.raises(OSError, match=r"half a line|No space"):
                attendant.look()
    attendant.look()
    found, damaged = read_alarms(open_store(tmp_path))
    assert {a["kind"] for a in found} == {"psi", "ks", "mean"}
    assert damaged <= 1  # the half line, on a line of its own


def test_records_are_read_once_in_bounded_pieces(tmp_path):
    stream = Stream(tmp_path, version=0).go_on(50)
    (tmp_path / "metrics" / "train" / "notes.txt").write_text("no records")
    tails = MetricTails(tmp_path, most_bytes=5000)
    found, looks, done = [], 0, False
    while not done:
        records, done = tails.read("train")
        assert sum(len(json.dumps(r)) for r in records) <= 6000
        found += records
        looks += 1
    assert looks > 5 and [r["sequence"] for r in found] == list(range(50))
    assert tails.read("train") == ([], True)
    again = MetricTails(tmp_path)
    again.restore(json.loads(json.dumps(tails.state())))
    assert again.read("train") == ([], True)
    stream.go_on(1)
    assert [r["sequence"] for r in again.read("train")[0]] == [50]


def test_half_a_line_waits_for_its_end_and_nonsense_is_counted(tmp_path):
    Stream(tmp_path, version=0).go_on(2)
    (path,) = (tmp_path / "metrics" / "train").iterdir()
    whole = path.read_bytes()
    tails = MetricTails(tmp_path)
    path.write_bytes(whole[:-20])
    assert len(tails.read("train")[0]) == 1
    path.write_bytes(whole)
    assert len(tails.read("train")[0]) == 1
    with open(path, "ab") as file:
        file.write(b'{"format": 1}\nnonsense\n')
    assert tails.read("train") == ([], True) and tails.damaged == 2
    # A line without end, longer than what is read at once, is passed over.
    tails = MetricTails(tmp_path, most_bytes=1000)
    path.write_bytes(b"x" * 2500 + b"\n" + whole)
    records = []
    for _ in range(20):
        records += tails.read("train")[0]
    assert len(records) <= 2 and tails.damaged >= 2


# Where numbers go.


def test_numbers_are_served_while_the_worker_looks(tmp_path):
    publish(tmp_path)
    Stream(tmp_path).go_on(6, shift=0.5)
    monitoring = Monitoring(prometheus_port=0)
    sinks = monitoring.sinks()
    attendant = Attendant(tmp_path, monitoring, sinks=sinks)
    attendant.look()
    port = sinks[0].port  # pyright: ignore
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    assert 'metagrad_filter_alarm{kind="psi"} 1.0' in text
    assert 'metagrad_filter_windows_total{decision="kept",source="web"}' in text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    totals = [float(v) for n, v in values.items() if n.startswith("metagrad_filter_windows_total")]
    assert sum(totals) == 6 * BLOCK
    assert float(values["metagrad_filter_score_psi"]) > float(
        values["metagrad_filter_score_psi_limit"]
    )
    attendant.round_ended({"seconds": {"fit": 1.5, "gate": 2.0}})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert "metagrad_filter_calibration_duration_seconds 3.5" in response.read().decode()
    attendant.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1)


class Sulking:
    def __init__(self):
        self.calls = 0

    def write(self, step, values, labels=None):
        self.calls += 1
        raise ConnectionError("no network")

    def close(self):
        raise ConnectionError("no network")


def test_a_sink_that_fails_is_warned_about_once_and_stops_nothing(tmp_path):
    publish(tmp_path)
    stream = Stream(tmp_path).go_on(6, shift=0.5)
    sink = Sulking()
    attendant = Attendant(tmp_path, QUICK, sinks=[sink])
    with pytest.warns(RuntimeWarning, match="Sulking does not take .*no network") as caught:
        attendant.look()
        stream.go_on(6)
        attendant.look()
        attendant.close()
    assert len(caught) == 1 and sink.calls > 5 and len(alarms(tmp_path)) >= 3


def test_a_port_that_is_taken_keeps_no_round_from_being_run(tmp_path):
    (held,) = Monitoring(prometheus_port=0).sinks()
    port = held.port  # pyright: ignore
    loop, _ = looking(small(tmp_path), Schedule(rounds=1), monitor=Monitoring(prometheus_port=port))
    with pytest.warns(RuntimeWarning, match=f"port {port} of 127.0.0.1 cannot be used"):
        assert loop.run() == 1
    held.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prometheus_port": 70000}, "prometheus_port=70000"),
        ({"prometheus_address": ""}, "prometheus_address=''"),
        ({"tensorboard": ""}, "tensorboard=''; expected a text"),
        ({"again_blocks": 0}, "again_blocks=0"),
        ({"triggers": ("age", "moon")}, "triggers holds 'moon'; expected some of"),
        ({"level": 0.5}, "level is 0.5"),
        ({"alarm_needed": 4}, "needed is 4 of among 3"),
        ({"target_keep_ratio": 2.0}, "target_keep_ratio is 2.0"),
    ],
)
def test_settings_out_of_their_domain_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Monitoring(**fields)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for monitoring, extra in (
        (Monitoring(tensorboard="events"), r"metagrad-filter\[tensorboard\]"),
        (Monitoring(wandb_project="filter"), r"metagrad-filter\[wandb\]"),
    ):
        with pytest.raises(ConfigError, match=f"not installed; pip install '{extra}'"):
            monitoring.require_packages()
    Monitoring(prometheus_port=0).require_packages()


# The reference pool.


def source_of(windows):
    return WindowSource(windows)


def many(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, (count, 9), dtype=np.int32)


@given(st.integers(24, 400), st.integers(3, 60), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_pool_is_drawn_once_and_is_the_same_ever_after(tmp_path_factory, count, size, seed):
    run_dir = tmp_path_factory.mktemp("run")
    source = source_of(many(count))
    index = np.random.default_rng(seed).permutation(count)
    pool = ReferencePool.open_or_create(run_dir, source, index, size, seed=seed)
    assert len(pool.windows) == min(size, count // 8)
    assert {w.tobytes() for w in pool.windows} <= {w.tobytes() for w in many(count)}
    assert pool.contains(pool.windows).all()
    assert pool.contains(source.take(index)).sum() == len(pool.windows)
    later = ReferencePool.open_or_create(run_dir, source_of(many(count, 5)), index, 3, seed=9)
    np.testing.assert_array_equal(later.windows, pool.windows)


def test_copies_beyond_those_of_the_pool_are_not_the_pools(tmp_path):
    windows = upwards(100, 1)  # eight kinds
    pool = ReferencePool.open_or_create(tmp_path, source_of(windows), np.arange(100), 10)
    assert pool.contains(windows).sum() == len(pool.windows) == 10


def test_windows_of_another_shape_have_another_pool_and_a_damaged_one_is_drawn_anew(tmp_path):
    index = np.arange(100)
    first = ReferencePool.open_or_create(tmp_path, source_of(many(100)), index, 10)
    series = np.random.default_rng(0).normal(size=(100, 5, 2)).astype(np.float32)
    other = ReferencePool.open_or_create(tmp_path, source_of(series), index, 10)
    assert other.windows.shape == (10, 5, 2)
    names = sorted(p.name for p in (tmp_path / "reference").iterdir())
    assert names == ["pool-5x2.npz", "pool-9.npz"]
    path = tmp_path / "reference" / "pool-9.npz"
    for damage in (b"", path.read_bytes()[:-40], b"PK\x03\x04" + b"\0" * 64):
        path.write_bytes(damage)
        with pytest.warns(RuntimeWarning, match="pool cannot be read .* another pool is drawn"):
            pool = ReferencePool.open_or_create(tmp_path, source_of(many(100)), index, 10)
        np.testing.assert_array_equal(pool.windows, first.windows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReferencePool.open_or_create(tmp_path, source_of(many(100)), index, 10)


def test_what_cannot_make_a_pool_is_refused(tmp_path):
    with pytest.raises(WindowError, match="20 windows may be labelled, too few to spare 3"):
        ReferencePool.open_or_create(tmp_path, source_of(many(100)), np.arange(20), 10)
    with pytest.raises(ConfigError, match="size=2"):
        ReferencePool.open_or_create(tmp_path, source_of(many(100)), np.arange(100), 2)
    with pytest.raises(ConfigError, match=r"shapes \(2, 5\) and \(4,\)"):
        agreement(np.zeros((2, 5)), np.zeros(4))


def test_agreement_is_the_rank_correlation_with_the_mean_of_the_halves():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=500)
    halves = truth + 0.5 * rng.normal(size=(2, 500))
    found = agreement(halves, np.exp(truth), version=3)
    assert found.low < found.rho < found.high and found.version == 3 and found.windows == 500
    assert found.rho > 0.9 and found.reliability is not None and found.reliability < found.rho
    against = agreement(halves, -truth)
    assert against.rho < -0.9
    assert found.to_json()["rho"] == found.rho


def test_a_scorer_that_fresh_labels_contradict_raises_an_alarm_and_asks_later(tmp_path):
    publish(tmp_path)
    stream = Stream(tmp_path).go_on(4)
    attendant = Attendant(tmp_path, QUICK, ask=True)
    attendant.look()
    bad = {"rho": 0.0, "low": -0.04, "high": 0.04}
    assert attendant.agreement({**bad, "version": 7}) == []  # nobody follows that one
    assert len(attendant.agreement({**bad, "version": 1})) == 1
    assert short(alarms(tmp_path)) == [("train", 1, "rank_agreement", "raised")]
    attendant.look()
    assert waiting_requests(tmp_path) == []  # the round that measured it has just ended
    stream.go_on(8)
    attendant.look()
    assert "rank_agreement 0 (limit 0.1)" in reasons(tmp_path)[0]
    serve_requests(tmp_path)
    good = {"rho": 0.6, "low": 0.55, "high": 0.65, "version": 1}
    assert "quiet again" in attendant.agreement(good)[0]
    stream.go_on(40)
    attendant.look()
    assert waiting_requests(tmp_path) == []


# The loop.


def test_the_loop_attends_asks_and_answers(tmp_path):
    """Drift of a running filter leads to a round, without a schedule and without anybody."""
    publish(tmp_path)
    stream = Stream(tmp_path).go_on(12)
    calibrator = small(tmp_path)
    loop, lines = looking(calibrator, Schedule(rounds=2, on_drift=True), monitor=QUICK)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    until(lambda: len(calibrator.reports()) == 1, 120)
    stream.version = calibrator.reports()[0]["version"] or 1
    stream.go_on(12)
    time.sleep(0.3)
    assert len(calibrator.reports()) == 1  # all is quiet
    stream.go_on(12, shift=100.0)
    until(lambda: not thread.is_alive(), 120)
    assert len(calibrator.reports()) == 2 and waiting_requests(tmp_path) == []
    assert any("asked for a round: drift of train" in line for line in lines)
    assert any("a round begins: asked for: drift of train" in line for line in lines)


def test_attending_goes_on_during_a_round(tmp_path):
    publish(tmp_path)
    stream = Stream(tmp_path).go_on(12)
    calibrator = small(tmp_path)
    seen = []

    def progress(stage, done, total):
        if stage == "labels" and not seen:
            stream.go_on(6, shift=0.5)
            time.sleep(0.05)
            seen.append(None)
        if stage == "gate":
            seen.append(len(alarms(tmp_path)))

    calibrator.progress = progress
    loop, _ = looking(calibrator, Schedule(rounds=1), monitor=QUICK)
    assert loop.run() == 1
    assert max(seen[1:]) == 3


def test_trouble_with_attending_keeps_no_round_from_being_run(tmp_path, monkeypatch):
    publish(tmp_path)
    Stream(tmp_path).go_on(2)

    def trouble(self, name, records):
        raise ZeroDivisionError("out of order")

    monkeypatch.setattr(Attendant, "_take", trouble)
    loop, lines = looking(small(tmp_path), Schedule(rounds=1))
    assert loop.run() == 1
    assert any("attending to drift failed" in line and "out of order" in line for line in lines)


# Live validation.


def falling(count, seed=0):
    rng = np.random.default_rng(seed)
    return 3 + 2 / np.sqrt(np.arange(1, count + 1)) + rng.normal(0, 0.005, count)


def record(run_dir, losses, first=0):
    for i, loss in enumerate(losses):
        record_validation(run_dir, (first + i) * 10, float(loss))


def test_a_broken_trend_sets_the_filter_to_uniform_at_once_and_asks_for_a_round(tmp_path):
    publish(tmp_path)
    registry = mgf.Registry(tmp_path)
    retreat = Retreat(tmp_path, registry)
    assert retreat.look() == []
    record(tmp_path, falling(100))
    assert retreat.look() == []
    record(tmp_path, falling(124)[100:] + 0.3, first=100)
    said = retreat.look()
    assert said[0].startswith("version 2 selects uniformly: the validation loss at step")
    assert registry.load(2).strength == 0 and retreat.count == 1
    assert reasons(tmp_path)[0].startswith("fell back to uniform: the validation loss")
    # Once, whoever looks, and the next version is not blamed for it.
    assert retreat.look() == Retreat(tmp_path, registry).look() == []
    serve_requests(tmp_path)
    publish(tmp_path, seed=3)
    record(tmp_path, falling(144)[124:], first=124)
    assert Retreat(tmp_path, registry).look() == []
    assert registry.versions() == [1, 2, 3] and waiting_requests(tmp_path) == []


def test_a_break_in_uniform_times_is_put_aside(tmp_path):
    registry = mgf.Registry(tmp_path)
    record_validation(tmp_path, 5, float("nan"))
    said = Retreat(tmp_path, registry).look()
    assert said == ["selection is uniform already: the validation loss at step 5 is nan"]
    publish(tmp_path)
    record_validation(tmp_path, 6, 3.0)
    assert Retreat(tmp_path, registry).look() == [] and registry.versions() == [1]
    record_validation(tmp_path, 7, float("inf"))
    assert "version 2 selects uniformly" in Retreat(tmp_path, registry).look()[0]


def test_a_process_killed_between_falling_back_and_asking_asks_after_its_restart(
    tmp_path, monkeypatch
):
    publish(tmp_path)
    registry = mgf.Registry(tmp_path)
    record_validation(tmp_path, 5, float("nan"))
    retreat = Retreat(tmp_path, registry)

    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        calls = iter([list, killed])
        patch.setattr(retreat, "_ask", lambda: next(calls)())
        with pytest.raises(KeyboardInterrupt):
            retreat.look()
    assert registry.load(2).strength == 0 and waiting_requests(tmp_path) == []
    assert Retreat(tmp_path, registry).look()[0].startswith("asked for a round")
    assert len(waiting_requests(tmp_path)) == 1 and registry.versions() == [1, 2]


def test_a_round_that_began_before_a_break_is_given_up_and_the_next_one_lifts_it(tmp_path):
    publish(tmp_path)
    calibrator = small(tmp_path)
    registry = calibrator.registry
    broken = []

    def progress(stage, done, total):
        if stage == "labels" and not broken:
            broken.append(registry.versions())
            record_validation(tmp_path, 5, float("nan"))
            time.sleep(0.05)

    calibrator.progress = progress
    loop, lines = looking(calibrator, Schedule(rounds=1))
    assert loop.run() == 1
    assert any("the round is given up" in line for line in lines)
    assert any("a round begins: the first round" in line for line in lines)
    strengths = [registry.load(version).strength for version in registry.versions()]
    assert strengths[:2] == [float("inf"), 0.0] and len(calibrator.reports()) == 1
    if calibrator.reports()[0]["version"] is not None:
        assert len(strengths) == 3


# In a process of its own, with a schedule.


def test_background_takes_a_schedule_and_shares_requests(tmp_path):
    calibrator = small(tmp_path)
    schedule = Schedule(rounds=2, on_drift=True)
    with calibrator.background(schedule=schedule, monitor=QUICK) as worker:
        worker.wait(1, timeout_seconds=300)
        request_round(tmp_path, "somebody asks")
        worker.wait(2, timeout_seconds=300)
    assert worker.process.exitcode == 0 and waiting_requests(tmp_path) == []


def test_background_refuses_a_schedule_given_twice(tmp_path):
    calibrator = small(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"rounds=1 .* beside a schedule"),
        calibrator.background(rounds=1, schedule=Schedule()),
    ):
        pass


def test_background_with_a_schedule_survives_rounds_that_raise(tmp_path):
    broken = {"table": jnp.zeros((3, 3))}  # of another vocabulary: every round raises
    calibrator = small(tmp_path, proxy=replace(proxy(), params=broken), config=SMALL)
    with calibrator.background(schedule=Schedule(rounds=1)) as worker:
        until(lambda: list((tmp_path / "rounds").glob("failed-*.json")), 120)
        assert worker.alive
    assert worker.process.exitcode in (0, -9)


def test_records_of_a_real_filter_are_followed(tmp_path):
    publish(tmp_path)
    Stream(tmp_path).go_on(3)
    assert len(read_records(tmp_path, "train")) == 3
    attendant = Attendant(tmp_path)
    attendant.look()
    assert attendant.monitors["train"].version == 1

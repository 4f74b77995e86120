"""View: everything that a run stores, JSON only, whatever is missing or damaged."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from example_run import (
    EVERY,
    REFERENCE,
    make_alarm,
    make_record,
    make_run,
    write_alarms,
    write_records,
)
from hotlane import make_scorer
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.calibration.validation import fall_back
from metagrad_filter.errors import ConfigError
from metagrad_filter.files import canonical_json
from metagrad_filter.monitor import records as reading
from metagrad_filter.monitor import stream
from metagrad_filter.monitor.view import plain, run_view
from metagrad_filter.monitor.words import alarm_text, verdict


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_whole_run_is_seen(run_dir):
    view = run_view(run_dir)
    assert json.loads(json.dumps(view, allow_nan=False)) == view
    assert view["problems"] == []
    assert [(v["version"], v["state"], v["strength"]) for v in view["versions"]] == [
        (1, "ok", 1.5),
        (2, "ok", "inf"),
    ]
    arms = view["versions"][1]["gate"]["arms"]
    assert [arms[1][f] for f in ("strength", "gain", "standard_error")] == ["inf", 0.0214, 0.0052]
    assert (arms[2]["running"], arms[2]["version"], arms[2]["gain"]) == (True, 1, 0.011)
    assert view["versions"][0]["gate"]["arms"][1]["starved"]["source"] == "books"
    assert view["validation"]["steps"] == list(range(0, 1600, 100))
    assert [r["version"] for r in view["rounds"]] == [1, 2, None]
    assert view["rounds"][2]["reason"].startswith("unreliable: split-half correlation 0.31")
    assert view["rejected"][0]["reason"] == "unreliable"
    seen = view["filters"]["train"]
    assert seen["target_ratio"] == seen["kept_ratio"] == 0.25
    assert seen["intervals"] == [
        {"first": 0, "last": 2, "version": 0},
        {"first": 3, "last": 11, "version": 1},
        {"first": 12, "last": 23, "version": 2},
    ]
    assert seen["swaps"] == [
        {"block": 0, "version": 0},
        {"block": 48, "version": 1},
        {"block": 192, "version": 2},
    ]
    assert (seen["version"], seen["age_blocks"], seen["age_seconds"]) == (2, 192, 23 * 40.0)


def test_the_series_follow_the_records(run_dir):
    series = run_view(run_dir)["filters"]["train"]["series"]
    assert {len(column) for column in series.values()} == {48}
    assert series["block"] == [EVERY * i + EVERY - 1 for i in range(48)]
    assert series["score_mean"][:6] == [None] * 6 and series["psi"][:6] == [None] * 6
    for name in ("psi", "ks"):
        excess = [v > b for v, b in zip(series[name][6:], series[name + "_limit"][6:])]
        assert excess == [False] * 34 + [True] * 8
    assert all(1.8 < cost < 2.6 for cost in series["us_per_window"])
    assert series["threshold_min"][-1] < series["threshold_mean"][-1] < series["threshold_max"][-1]


def test_groups_features_and_the_histogram_add_up(run_dir):
    seen = run_view(run_dir)["filters"]["train"]
    groups = {g["label"]: g for g in seen["groups"]["source"]}
    assert sum(g["seen"] for g in groups.values()) == seen["windows"]
    assert sum(g["kept"] for g in groups.values()) == seen["kept"]
    assert len(groups["web"]["share"]) == 48
    histogram = seen["histogram"]
    assert sum(histogram["bins"]) == histogram["windows"] == 8 * 4096
    assert sum(histogram["kept_bins"]) == 8 * 1024
    assert histogram["edges"] == REFERENCE[::4] and len(histogram["edges"]) == 65
    means = [250 + i / 9 for i in range(48)]
    length = seen["features"]["length"]
    assert length["mean"] == pytest.approx(np.mean(means))
    assert length["deviation"] == pytest.approx(math.sqrt(np.var(means) + 9e5 / 4096))


def test_an_empty_directory_is_an_empty_view(tmp_path):
    view = run_view(tmp_path)
    assert view["versions"] == view["rounds"] == view["problems"] == []
    assert view["filters"] == {}


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"not a directory; pass the one that score_filter"):
            run_view(path)
    with pytest.raises(ConfigError, match="run_dir is 5"):
        run_view(5)  # pyright: ignore[reportArgumentType]


def test_a_filter_without_records_shows_its_ledger(tmp_path):
    mgf.Ledger(tmp_path, "train").decide(0, 0)
    seen = run_view(tmp_path)["filters"]["train"]
    assert seen["intervals"] == [{"first": 0, "last": 0, "version": 0}]
    assert seen["config"] is None and seen["target_ratio"] is None
    assert seen["records"] == 0 and seen["series"] == {} and seen["histogram"] is None


def test_damage_is_named_and_the_rest_is_shown(tmp_path):
    make_run(tmp_path, records=8)
    payload = tmp_path / "registry" / "00000001.safetensors"
    payload.write_bytes(payload.read_bytes()[:-1])
    (tmp_path / "registry" / "rejected-2.json").write_text("[]")
    (tmp_path / "rounds" / "round-000002.json").write_text("{")
    (tmp_path / "ledger" / "train" / "00000001.json").write_text("{}")
    (tmp_path / "metrics" / "stray").write_text("not a folder")
    view = run_view(tmp_path)
    assert [v["state"] for v in view["versions"]] == ["refused (truncated)", "ok"]
    assert [r["round"] for r in view["rounds"]] == [1, 3]
    assert view["filters"]["train"]["records"] == 8
    told = "\n".join(view["problems"])
    for part in ("Version 1:", "rejected-2.json is not", "round-000002.json cannot", "is damaged"):
        assert part in told
    # Without loading, a version is as good as its manifest.
    assert run_view(tmp_path, verify=False)["versions"][0]["state"] == "ok"


def test_torn_and_odd_lines_are_counted(tmp_path):
    good = [canonical_json(make_record(i, 1)) for i in range(3)]
    odd: list[Any] = [
        make_record(3, 1) | {"format": 2},
        make_record(3, 1) | {"kept": 10**9},
        make_record(3, 1) | {"blocks": -1},
        make_record(3, 1) | {"scores": {"count": 1, "bins": [1] * 63}},
        [1],
    ]
    path = tmp_path / "metrics" / "train" / "host-1-1.jsonl"
    path.parent.mkdir(parents=True)
    lines = [*good, *map(canonical_json, odd), b'{"format": NaN}', b"\xff", b"[" * 100_000]
    path.write_bytes(b"\n".join(lines) + b"\n" + good[0][: len(good[0]) // 2])
    view = run_view(tmp_path)
    assert view["filters"]["train"]["records"] == 3
    assert view["problems"] == [
        "Filter train: 9 lines are no complete record and left out.",
    ]


def test_records_of_a_store_without_appends_are_read_too(tmp_path):
    store = mgf.Registry("memory://test-view").store
    for i in range(3):
        store.write_once(f"metrics/train/s-{i:08d}.json", canonical_json(make_record(i, 0)))
    assert run_view("memory://test-view")["filters"]["train"]["records"] == 3


def test_records_of_several_processes_over_the_same_blocks_are_one_point(tmp_path):
    records = [make_record(i, 1, seed=worker) for worker in range(3) for i in range(4)]
    write_records(tmp_path, records)
    seen = run_view(tmp_path)["filters"]["train"]
    assert seen["series"]["block"] == [7, 15, 23, 31]
    assert seen["series"]["windows"] == [3 * 4096] * 4


def test_long_series_are_shortened_and_keep_their_sums():
    base = make_record(0, 1)
    records = [
        base | {"first_block": 8 * i, "last_block": 8 * i + 7, "version": 1 + (i >= 3000)}
        for i in range(5001)
    ]
    seen = stream.stream_view(records, {})
    series = seen["series"]
    assert 1000 < len(series["block"]) <= stream.MAX_POINTS
    assert sum(series["windows"]) == seen["windows"] == 5001 * 4096
    assert series["block"] == sorted(series["block"]) and series["block"][-1] == 8 * 5001 - 1
    assert seen["swaps"] == [{"block": 0, "version": 1}, {"block": 24000, "version": 2}]
    restless = [r | {"version": i % 2} for i, r in enumerate(records)]
    assert len(stream.stream_view(restless, {})["series"]["block"]) == stream.MAX_POINTS


def test_the_limits_are_exceeded_once_in_a_thousand_times_without_drift():
    rng, trials, n, m = np.random.default_rng(0), 4000, 8192, 4096
    # A reference of m windows: the true shares between its quantiles are spacings.
    shares = rng.dirichlet(np.full(64, m / 64), trials)
    found = np.array([(stream.psi(b), stream.ks(b)) for b in rng.multinomial(n, shares)])
    psi_rate, ks_rate = (found > stream.limits(n, m)).mean(axis=0)
    assert psi_rate < 0.003 and ks_rate < 0.002
    # It is the reference's own sampling that most of the limit allows for.
    assert (found[:, 0] > stream.limits(n, math.inf)[0]).mean() > 0.5
    assert stream.psi(np.full(64, 100)) == pytest.approx(0) and stream.ks(np.full(64, 9)) == 0


def test_a_small_shift_exceeds_the_limits():
    scores = np.random.default_rng(1).normal(0.3, 1, 4096)
    edges = np.quantile(np.random.default_rng(2).normal(size=4096), np.arange(1, 64) / 64)
    bins = np.bincount(np.searchsorted(edges, scores), minlength=64)
    psi_limit, ks_limit = stream.limits(4096, 4096)
    assert stream.psi(bins) > 1.5 * psi_limit and stream.ks(bins) > 1.5 * ks_limit


@pytest.mark.parametrize(
    ("recorded", "windows"), [(4096, 4096), (100, 100), (None, 4096), (0, 4096), ("9", 4096)]
)
def test_the_size_of_the_reference_is_what_the_version_says(recorded, windows):
    assert stream.reference_size({"reference_windows": recorded}) == windows


def test_blocks_that_ask_no_version_are_no_change_of_version(tmp_path):
    records = [make_record(i, 1) for i in range(4)]
    records[2] |= {"version": -1, "scores": None, "threshold": None, "kept": 0}
    write_records(tmp_path, records)
    seen = run_view(tmp_path)["filters"]["train"]
    assert seen["swaps"] == [{"block": 0, "version": 1}] and seen["age_blocks"] == 32
    assert seen["series"]["version"] == [1, 1, -1, 1]
    write_records(tmp_path, records[2:3])
    assert run_view(tmp_path)["filters"]["train"]["version"] is None


def test_the_newest_files_are_read_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MAX_BYTES", 1)
    folder = tmp_path / "metrics" / "train"
    folder.mkdir(parents=True)
    names = ["host-9-1800000000000000000", "host-1-1800000000000000001", "odd"]
    names.append(names[1] + "-0010")
    for i, name in enumerate(names):
        line = canonical_json(make_record(i, 0))
        (folder / f"{name}.jsonl").write_bytes(line + b"\n")
    assert run_view(tmp_path)["filters"]["train"]["series"]["block"] == [31]


def test_records_that_the_package_writes_are_read(tmp_path):
    blockstats = pytest.importorskip("metagrad_filter.blockstats")
    scorer = make_scorer(metadata={"reference": REFERENCE, "labels": 4096})
    version = mgf.Registry(tmp_path).publish(scorer)
    statistics = blockstats.BlockStatistics(tmp_path, "train", every_blocks=4)
    rng = np.random.default_rng(0)
    for block in range(8):
        scores = rng.normal(size=512).astype(np.float32)
        kept = np.sort(np.argsort(scores)[-128:])
        statistics.block(
            block=block, version=version, scorer=scorer, scores=scores, kept=kept, seconds=0.001
        )
    statistics.flush()
    view = run_view(tmp_path)
    seen = view["filters"]["train"]
    assert view["problems"] == [] and seen["series"]["block"] == [3, 7]
    assert (seen["windows"], seen["kept"], seen["version"]) == (4096, 1024, version)
    assert sum(seen["histogram"]["bins"]) == 4096


def test_a_version_without_reference_has_no_drift(tmp_path):
    mgf.Registry(tmp_path).publish(make_scorer())
    record = make_record(0, 1)
    record["scores"] |= {"bins": None, "kept_bins": None}
    write_records(tmp_path, [record])
    seen = run_view(tmp_path)["filters"]["train"]
    assert seen["series"]["psi"] == [None] and seen["histogram"] is None
    assert seen["series"]["score_mean"] == [record["scores"]["mean"]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_plain_is_json_whatever_comes_in(value):
    text = json.dumps(plain(value), allow_nan=False)
    text.encode()
    assert plain(json.loads(text)) == plain(value)


@given(st.sampled_from(sorted(make_record(0, 1))), JSON)
def test_a_field_of_any_value_never_stops_the_view(field, value):
    line = json.dumps(make_record(0, 1) | {field: value}).encode()
    record = reading.parse_record(line)
    if record is not None:
        json.dumps(plain(stream.stream_view([record, make_record(1, 1)], {})), allow_nan=False)


@given(st.sampled_from(["scores", "threshold", "groups", "features"]), JSON)
def test_a_nested_field_of_any_value_never_stops_the_view(field, value):
    record = make_record(0, 1)
    name = next(iter(record[field]))
    record[field] = record[field] | {name: value}
    parsed = reading.parse_record(json.dumps(record).encode())
    if parsed is not None:
        json.dumps(plain(stream.stream_view([parsed], {})), allow_nan=False)


def test_alarms_are_shown_in_words_and_those_that_stand_apart(run_dir):
    assert run_view(run_dir)["watched"]
    alarms = run_view(run_dir)["filters"]["train"]["alarms"]
    assert [(a["kind"], a["state"]) for a in alarms["events"]] == [
        ("ks", "raised"),
        ("ks", "cleared"),
        ("psi", "raised"),
    ]
    assert [(a["kind"], a["block"]) for a in alarms["standing"]] == [("psi", 383)]
    assert alarms["events"][0]["text"] == (
        "The scores' distribution differs from the version's reference (KS 0.05, limit 0.011)."
    )
    assert alarms["events"][1]["text"] == (
        "No longer so: the scores' distribution differs from the version's reference (KS 0.05, "
        "limit 0.011). Another version acts."
    )
    quiet = alarm_text(make_alarm("psi", 1, "cleared", value=0.01))
    assert quiet.endswith("(PSI 0.01, limit 0.011).")


def test_torn_and_odd_alarms_are_counted_and_those_of_other_filters_stay_there(tmp_path):
    write_records(tmp_path, [make_record(0, 0)])
    good = make_alarm("psi", 7, "raised")
    path = write_alarms(tmp_path, [good, good | {"filter": "other"}, good | {"state": "odd"}])
    path.write_bytes(path.read_bytes() + b'{"format": 1, "fil')
    view = run_view(tmp_path)
    assert view["filters"]["train"]["alarms"]["count"] == 1
    assert view["problems"] == [
        "monitor/alarms.jsonl: 2 lines are no complete alarm and left out.",
    ]


def test_the_agreement_its_interval_and_the_cost_of_rounds_are_shown(run_dir):
    view = run_view(run_dir)
    agreement = view["rounds"][1]["agreement"]
    assert [round(agreement[f], 9) for f in ("rho", "low", "high")] == [0.6, 0.55, 0.65]
    assert (agreement["version"], agreement["windows"]) == (2, 256)
    assert view["rounds"][0]["verdict"] == "Published."
    assert view["rounds"][2]["verdict"].startswith("Not published: the two halves of the labels")
    kept = view["filters"]["train"]["kept"]
    assert view["cost"] == {
        "gradients": 4500.0,
        "stages": {"labels": 3000.0, "fit": 0.0, "gate": 1500.0},
        "rounds": 3,
        "trained_windows": kept,
        "share": 4500 / kept,
    }
    (check,) = view["checks"]
    assert (check["name"], check["kind"], check["reliability"]) == ("000001", "lds", 0.92)
    assert [check[f] for f in ("validity", "low", "high")] == [0.71, 0.6, 0.8]
    assert check["classes"][0]["effect"] == 0.0102


def test_reports_of_an_older_layout_are_shown_without_what_they_lack(tmp_path):
    (tmp_path / "rounds").mkdir()
    old = {"round": 1, "version": None, "reason": "gate: no strength was clearly better"}
    (tmp_path / "rounds" / "round-000001.json").write_text(json.dumps(old))
    view = run_view(tmp_path)
    assert view["problems"] == []
    (found,) = view["rounds"]
    assert found["agreement"] is None and found["gradients"] is None and found["gate"] is None
    assert found["verdict"].startswith("Not published: no strength was clearly better")
    assert view["cost"]["gradients"] is None and view["cost"]["share"] is None


def test_a_version_that_fell_back_says_why(tmp_path):
    registry = mgf.Registry(tmp_path)
    registry.publish(make_scorer())
    assert fall_back(registry, "held-out loss 3.9 lies above its trend") == 2
    assert not run_view(tmp_path)["watched"]
    versions = run_view(tmp_path)["versions"]
    assert [v["fallback"] for v in versions] == [None, "held-out loss 3.9 lies above its trend"]
    assert versions[1]["strength"] == 0


def test_a_shift_exceeds_the_wasserstein_limit_and_no_shift_does_not(run_dir):
    series = run_view(run_dir)["filters"]["train"]["series"]
    pairs = list(zip(series["wasserstein"], series["wasserstein_limit"]))
    assert pairs[:6] == [(None, None)] * 6
    assert [value > limit for value, limit in pairs[6:]] == [False] * 34 + [True] * 8


def test_the_threshold_that_the_ratio_implies_is_read_from_the_distributions(run_dir):
    threshold = run_view(run_dir)["filters"]["train"]["threshold"]
    # A quarter of the reference lies above its third quartile; the newest windows are shifted up.
    assert threshold["reference"] == pytest.approx(np.quantile(REFERENCE, 0.75))
    assert threshold["reference"] < threshold["newest"] < max(REFERENCE)
    assert threshold["realised"] == pytest.approx(1.27, abs=0.1)


@given(st.dictionaries(st.sampled_from([*make_alarm("psi", 1, "raised")]), JSON))
def test_an_alarm_of_any_fields_never_stops_the_view(fields):
    alarm = reading.parse_alarm(json.dumps(make_alarm("psi", 1, "raised") | fields).encode())
    if alarm is not None:
        assert alarm_text(alarm).endswith(".")
        json.dumps(plain(alarm), allow_nan=False)


@pytest.mark.parametrize(
    "kind",
    ["psi", "ks", "mean", "keep_ratio", "age", "rank_agreement", "feature:a{b}", "new{kind}"],
)
def test_every_kind_of_alarm_has_words_with_its_numbers(kind):
    for state in ("raised", "cleared"):
        text = alarm_text(make_alarm(kind, 1, state, value=0.125, limit=7.5))
        assert "0.125" in text and "7.5" in text and text[0].isupper()


@pytest.mark.parametrize(
    "code",
    [
        "unreliable",
        "non_finite",
        "starves",
        "guard",
        "not_better_than_uniform",
        "worse_than_running",
        "diverged",
    ],
)
def test_every_reason_of_a_rejection_has_a_sentence(code):
    assert verdict(code) == verdict(f"{code.replace('_', '-')}: details") != code
    assert verdict(code).startswith("Not published: ")
    assert verdict("something new") == "something new" and verdict(None) == "No reason given."

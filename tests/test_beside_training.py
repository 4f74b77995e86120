"""What the hot lane leaves for the monitor and for calibration, and that both can read it."""

import gc

import grain
import numpy as np
import pytest
from hotlane import make_elements, make_scorer, make_windows

import metagrad_filter as mgf
from metagrad_filter.blockstats import merge, read_records
from metagrad_filter.errors import ConfigError
from metagrad_filter.monitor.alarms import Monitor
from metagrad_filter.monitor.page import write_run_report

WINDOWS = mgf.TextWindows("tokens")
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def elements_with_sources(n):
    return [e | {"source": "ab"[i % 4 == 0]} for i, e in enumerate(make_elements(n))]


def publish(run_dir, seed=1):
    scorer = make_scorer(seed)
    quantiles = np.quantile(scorer.score(make_windows(4096, seed=99)), np.linspace(0, 1, 257))
    return mgf.Registry(run_dir).publish(scorer, {"reference": [float(q) for q in quantiles]})


def drained(run_dir, elements, path, **options):
    ds = grain.MapDataset.source(elements)
    ds = ds if path == "map" else ds.to_iter_dataset(IN_PROCESS)
    options = {"keep_ratio": 0.25, "windows": WINDOWS, "block_windows": 20} | options
    ds = mgf.score_filter(ds, run_dir, **options)
    ds = ds.to_iter_dataset(IN_PROCESS) if path == "map" else ds
    kept = [int(element["index"]) for element in ds]
    del ds
    gc.collect()  # what is not yet written is written when the filter goes
    return kept


@pytest.mark.parametrize(
    ("path", "rule"), [("map", "block"), ("iter", "block"), ("iter", "threshold")]
)
def test_records_say_what_was_seen_and_kept(tmp_path, path, rule):
    publish(tmp_path)
    elements = elements_with_sources(400)
    kept = drained(tmp_path, elements, path, rule=rule, source_key="source")
    record = merge(read_records(tmp_path, "default"))
    assert record["windows"] == 400 and record["kept"] == len(kept)
    assert record["version"] == 1 and record["blocks"] == 20 and record["seconds"] > 0
    scores = make_scorer(1).score(np.stack([e["tokens"] for e in elements]))
    assert record["scores"]["mean"] == pytest.approx(scores.mean(), abs=1e-5)
    assert sum(record["scores"]["kept_bins"]) == len(kept)
    assert record["groups"]["source"]["b"] == [100, sum(i % 4 == 0 for i in kept)]


def test_statistics_change_nothing_and_can_be_switched_off(tmp_path):
    for run_dir in (tmp_path / "on", tmp_path / "off"):
        publish(run_dir)
    elements = make_elements(200)
    kept = drained(tmp_path / "on", elements, "iter", spool_share=0.5)
    assert drained(tmp_path / "off", elements, "iter", statistics=False) == kept
    assert not (tmp_path / "off" / "metrics").exists()
    assert not (tmp_path / "off" / "spool").exists()


def test_the_monitor_and_the_report_read_the_records(tmp_path):
    publish(tmp_path)
    drained(tmp_path, elements_with_sources(4000), "iter", block_windows=50)
    monitor = Monitor()
    findings = monitor.feed(read_records(tmp_path, "default"))
    assert not [finding for finding in findings if finding.state == "raised"]
    assert monitor.current["psi"].state == monitor.current["ks"].state == "quiet"
    path, view = write_run_report(tmp_path, tmp_path / "report.html")
    assert "default" in view["filters"] and path.stat().st_size > 50_000


def test_a_sample_of_the_raw_stream_waits_for_calibration(tmp_path):
    publish(tmp_path)
    elements = make_elements(2000)
    drained(tmp_path, elements, "iter", spool_share=0.1)
    spooled = mgf.SpooledWindows(tmp_path, "default")
    assert 150 < len(spooled) < 250
    windows = spooled.take(np.arange(len(spooled)))
    everything = {e["tokens"].tobytes() for e in elements}
    assert {window.tobytes() for window in windows} <= everything
    # Raw: what the filter kept is in it in proportion, not more.
    assert 20 < np.count_nonzero(spooled.kept) < 90


def test_options_out_of_their_domain_are_refused(tmp_path):
    for options, message in (
        ({"statistics": 1}, "statistics is 1"),
        ({"source_key": 3}, "source_key is 3"),
        ({"spool_share": 1.5}, "spool_share is 1.5"),
        ({"spool_share": 0.1, "rule": "threshold"}, "spool_share needs rule='block'"),
    ):
        with pytest.raises(ConfigError, match=message):
            drained(tmp_path, make_elements(20), "iter", **options)

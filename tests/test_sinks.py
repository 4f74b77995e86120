"""Sinks write what they are given, refuse what they do not know, and name what is missing."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import urllib.request
from typing import Any

import pytest
from example_run import make_record, make_run, write_records
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from metagrad_filter.errors import ConfigError
from metagrad_filter.monitor import sinks
from metagrad_filter.monitor.alarms import Finding
from metagrad_filter.monitor.exporter import RunExporter
from metagrad_filter.monitor.sinks import JsonLines, MetricSink, Prometheus
from metagrad_filter.monitor.view import run_view

KEPT = {"decision": "kept", "source": "web"}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def fetch(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        sample.name + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_json_lines_append_whole_lines(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    for step in (3, 4):
        sink = JsonLines(path)
        sink.write(step, {"keep_ratio": 0.25, "threshold": math.nan}, KEPT)
        sink.close()
        sink.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {
        "step": 3,
        "labels": KEPT,
        "values": {"keep_ratio": 0.25, "threshold": None},
    }
    assert [line["step"] for line in lines] == [3, 4]
    with pytest.raises(ConfigError, match="is closed"):
        sink.write(5, {})
    with pytest.raises(ConfigError, match="cannot be written"):
        JsonLines(path / "below-a-file")


def test_prometheus_serves_counters_gauges_and_the_histogram():
    sink = Prometheus(CollectorRegistry())
    assert isinstance(sink, MetricSink)
    port = sink.serve(0)
    try:
        for step in (1, 2):
            sink.write(step, {"windows_total": 128}, KEPT)
            sink.write(step, {"keep_ratio": 0.2 + step / 100, "score_psi": 0.01})
        sink.observe_scores([2] * 32 + [0] * 32)
        found = fetch(port)
        with pytest.raises(ConfigError, match="served already"):
            sink.serve(0)
        other = Prometheus(CollectorRegistry())
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be used"):
            other.serve(port)
    finally:
        sink.close()
        sink.close()
    assert found["metagrad_filter_windows_total|decision=kept|source=web"] == 256
    assert found["metagrad_filter_keep_ratio"] == 0.22
    assert found["metagrad_filter_score_psi"] == 0.01
    assert found["metagrad_filter_score_bucket|le=0.25"] == 32
    assert found["metagrad_filter_score_bucket|le=+Inf"] == found["metagrad_filter_score_count"]
    assert found["metagrad_filter_score_count"] == 64
    with pytest.raises(OSError, match="refused"):
        fetch(port)


def test_sources_beyond_32_are_other():
    registry = CollectorRegistry()
    sink = Prometheus(registry)
    for number in range(40):
        labels = {"decision": "kept", "source": f"source-{number}"}
        sink.write(0, {"windows_total": 1}, labels)
    sink.write(0, {"windows_total": 1}, {"decision": "kept", "source": "source-3"})

    def total(source: str):
        return registry.get_sample_value(
            "metagrad_filter_windows_total", {"decision": "kept", "source": source}
        )

    assert (total("other"), total("source-3"), total("source-39")) == (8, 2, None)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ({"nonsense": 1}, None, "'nonsense' is unknown"),
        ({"windows_total": 1}, None, r"labels of windows_total are \[\]"),
        ({"keep_ratio": 1}, {"shard": "3"}, r"are \['shard'\], expected \[\]"),
        ({"windows_total": -1}, KEPT, "windows_total is -1.0"),
        ({"keep_ratio": "much"}, None, "'keep_ratio' is 'much'"),
    ],
)
def test_what_is_unknown_is_refused_and_nothing_is_written(values, labels, message):
    registry = CollectorRegistry()
    sink = Prometheus(registry)
    with pytest.raises(ConfigError, match=message):
        sink.write(0, {"scorer_version": 7, **values} if not labels else values, labels)
    assert registry.get_sample_value("metagrad_filter_scorer_version") == 0
    with pytest.raises(ConfigError, match="step is -1"):
        sink.write(-1, {})
    with pytest.raises(ConfigError, match="expected 64 counts"):
        sink.observe_scores([1, 2])


def test_a_second_sink_in_one_registry_is_refused_and_the_first_goes_on():
    registry = CollectorRegistry()
    sink = Prometheus(registry)
    with pytest.raises(ConfigError, match="one Prometheus sink a process"):
        Prometheus(registry)
    sink.write(0, {"keep_ratio": 0.5})
    assert registry.get_sample_value("metagrad_filter_keep_ratio") == 0.5


@pytest.mark.parametrize("port", [-1, 65536, "9432", True])
def test_bad_ports_are_named(port):
    with pytest.raises(ConfigError, match="port is"):
        Prometheus(CollectorRegistry()).serve(port)


def test_processes_add_up_in_multiprocess_mode(tmp_path):
    """As in grain's workers: files of one directory, counters summed, gauges the newest."""
    program = """
import os, sys, time, urllib.request
from metagrad_filter.monitor.sinks import Prometheus
sink = Prometheus()
labels = {"decision": "kept", "source": "web"}
sink.write(0, {"windows_total": 5}, labels)
sink.write(0, {"keep_ratio": float(sys.argv[1])})
if sys.argv[1] == "0.5":
    port = sink.serve(0)
    print(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
    sink.close()
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for ratio in ("0.25", "0.5"):
        output = subprocess.run(
            [sys.executable, "-c", program, ratio],
            env=environment, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    assert 'metagrad_filter_windows_total{decision="kept",source="web"} 10.0' in output
    assert "metagrad_filter_keep_ratio 0.5" in output


def test_values_of_a_record_are_known_to_every_sink():
    record = {
        "version": 3,
        "seconds": 0.5,
        "windows": 512,
        "kept": 128,
        "threshold": {"mean": 1.5},
        "scores": {"mean": 0.25},
    }
    kinds = ("psi", "ks", "mean", "age", "rank_agreement", "keep_ratio", "feature:loss")
    current = {kind: Finding(kind, 7, 0.1, 0.2, "quiet") for kind in kinds}
    values = sinks.values_of(record, current)
    assert values["keep_ratio"] == 0.25 and values["scorer_version"] == 3
    assert (values["score_psi"], values["score_psi_limit"]) == (0.1, 0.2)
    registry = CollectorRegistry()
    Prometheus(registry).write(7, values)
    assert registry.get_sample_value("metagrad_filter_rank_correlation") == 0.1
    empty = record | {"version": -1, "windows": 0, "threshold": None, "scores": None}
    assert sinks.values_of(empty, {}) == {
        "scorer_version": 0,
        "score_duration_seconds_total": 0.5,
    }


@pytest.mark.skipif(not installed("tensorboardX"), reason="tensorboardX is not installed")
def test_tensorboard_files_hold_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]

    sink = sinks.TensorBoard(tmp_path)
    sink.write(5, {"keep_ratio": 0.25})
    sink.write(6, {"windows_total": 2}, KEPT)
    sink.close()
    sink.close()
    (path,) = tmp_path.iterdir()
    data, found, position = path.read_bytes(), {}, 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        event = Event.FromString(data[position + 12 : position + 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        position += 16 + length
    assert found == {"filter/keep_ratio": (5, 0.25), "filter/windows_total/kept/web": (6, 2.0)}


@pytest.mark.skipif(installed("tensorboardX"), reason="tensorboardX is installed")
def test_without_tensorboardx_the_sink_says_what_to_install(tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'metagrad-filter\[tensorboard\]'"):
        sinks.TensorBoard(tmp_path)


@pytest.mark.skipif(installed("wandb"), reason="wandb is installed")
def test_without_wandb_the_sink_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install 'metagrad-filter\[wandb\]'"):
        sinks.WeightsAndBiases(project="p")


def test_one_block_is_counted_by_decision_and_source():
    registry = CollectorRegistry()
    options: dict[str, Any] = {
        "block": 3,
        "version": 2,
        "windows": 4,
        "target": 0.5,
        "seconds": 0.25,
    }
    sink = Prometheus(registry)
    for _ in range(2):
        sinks.export_block(
            sink, kept=[0, 3], sources=["web", "web", "books", "books"], tokens=16,
            threshold=1.5, **options,
        )  # fmt: skip
    value = registry.get_sample_value
    kept = {"decision": "kept", "source": "books"}
    assert value("metagrad_filter_windows_total", kept) == 2
    assert value("metagrad_filter_tokens_total", kept | {"decision": "dropped"}) == 32
    assert value("metagrad_filter_keep_ratio") == value("metagrad_filter_target_keep_ratio") == 0.5
    assert value("metagrad_filter_threshold") == 1.5
    assert value("metagrad_filter_score_duration_seconds_total") == 0.5
    # A uniform block of a filter without sources, before the first version.
    uniform: dict[str, Any] = options | {"version": -1, "block": 4}
    sinks.export_block(sink, kept=[1], **uniform)
    assert value("metagrad_filter_windows_total", {"decision": "dropped", "source": ""}) == 3
    assert value("metagrad_filter_scorer_version") == 0


def test_without_an_exporter_of_several_processes_nothing_is_made(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert sinks.exported() is None


def test_importing_the_sinks_imports_no_package_of_theirs():
    program = """
import sys, metagrad_filter.monitor.sinks
print(sorted({"prometheus_client", "tensorboardX", "wandb", "scipy", "jax"} & set(sys.modules)))
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output == "[]\n"


def test_an_exporter_tells_what_the_view_shows(tmp_path):
    run_dir = make_run(tmp_path)
    view = run_view(run_dir)
    seen = view["filters"]["train"]
    with RunExporter(run_dir) as exporter:
        port = exporter.serve(0)
        found = fetch(port)
    with pytest.raises(OSError, match="refused"):
        fetch(port)
    for group in seen["groups"]["source"]:
        kept = f"metagrad_filter_windows_total|decision=kept|source={group['label']}"
        assert found[kept] == group["kept"]
    total = sum(v for k, v in found.items() if k.startswith("metagrad_filter_windows_total|"))
    assert total == found["metagrad_filter_score_count"] + 6 * 4096 == seen["windows"]
    assert found["metagrad_filter_score_psi"] == seen["series"]["psi"][-1]
    assert found["metagrad_filter_score_psi"] > found["metagrad_filter_score_psi_limit"]
    assert found["metagrad_filter_scorer_version"] == 2
    assert found["metagrad_filter_rank_correlation"] == pytest.approx(0.65)
    assert found["metagrad_filter_alarm|kind=psi"] == 1
    assert found["metagrad_filter_alarm|kind=ks"] == 0
    assert found["metagrad_filter_calibration_duration_seconds"] == pytest.approx(96.7)
    # Names are those of every other way to the dashboard.
    suffixes = ("_bucket", "_count", "_sum")
    for name in found:
        known = name.partition("|")[0].removeprefix("metagrad_filter_")
        assert known in sinks.METRICS or known.removeprefix("score") in suffixes, name


def test_an_empty_run_has_no_numbers_and_a_growing_one_is_read_again(tmp_path):
    exporter = RunExporter(tmp_path, fresh_seconds=0.0)
    assert "windows_total" not in exporter.text().decode()
    write_records(tmp_path, [make_record(0, 0), make_record(1, 0)])
    exporter._again = 0.0
    text = exporter.text().decode()
    assert "metagrad_filter_score_psi" not in text
    first = sum(s.value for f in exporter.collect() if "windows" in f.name for s in f.samples)
    assert first == 8192
    # What is no longer there was counted all the same.
    write_records(tmp_path, [make_record(1, 0)])
    exporter._again = 0.0
    again = sum(s.value for f in exporter.collect() if "windows" in f.name for s in f.samples)
    assert again == first


def test_a_taken_port_of_the_exporter_is_named(tmp_path):
    with RunExporter(tmp_path) as exporter, RunExporter(tmp_path) as other:
        port = exporter.serve(0)
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be used"):
            other.serve(port)


# Real workers of grain: each counts its blocks, grain's own endpoint adds them up.
WORKERS = """
import sys, time, urllib.request
import grain, numpy as np
from absl import flags
from metagrad_filter.monitor.sinks import export_block, exported

class Count(grain.transforms.Map):
    def map(self, element):
        sink = exported()
        assert sink is not None
        export_block(sink, block=int(element), version=3, kept=[0], windows=4, tokens=8)
        return element

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    ds = grain.MapDataset.range(40).to_iter_dataset().map(Count())
    ds = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    assert len(list(ds)) == 40
    print(urllib.request.urlopen("http://127.0.0.1:9431/metrics", timeout=20).read().decode())
"""


@pytest.mark.slow
def test_numbers_of_workers_are_on_the_port_of_grains_own_exporter(tmp_path):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 9431)) == 0:
            pytest.skip("grain's port 9431 is taken on this machine")
    program = tmp_path / "program.py"
    program.write_text(WORKERS)
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    finished = subprocess.run(
        [sys.executable, str(program)],
        env=environment | {"ENABLE_PYGRAIN_PROMETHEUS_TELEMETRY": "true"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    text = finished.stdout
    assert 'metagrad_filter_windows_total{decision="kept",source=""} 40.0' in text
    assert 'metagrad_filter_windows_total{decision="dropped",source=""} 120.0' in text
    assert 'metagrad_filter_tokens_total{decision="kept",source=""} 320.0' in text
    assert "metagrad_filter_scorer_version 3.0" in text
    assert "grain_python" in text

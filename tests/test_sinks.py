"""Sinks write what they are given, refuse what they do not know, and name what is missing."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from metagrad_filter.errors import ConfigError
from metagrad_filter.monitor import sinks
from metagrad_filter.monitor.alarms import Finding
from metagrad_filter.monitor.sinks import JsonLines, MetricSink, Prometheus

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
        with pytest.raises(ConfigError, match="serves already"):
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

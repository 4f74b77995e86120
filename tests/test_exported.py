"""A filter's own numbers reach grain's exporter from worker processes, whatever becomes of them."""

import os
import socket
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hotlane import make_elements, make_scorer

import metagrad_filter as mgf
from metagrad_filter import blocks
from metagrad_filter.blocks import BlockFilter, FilterConfig

# A filter in two worker processes of grain; its counters are read from grain's own endpoint.
PROGRAM = """
import sys, urllib.request
import grain, numpy as np
from absl import flags
import metagrad_filter as mgf

class Windows:
    def __len__(self):
        return 4096
    def __getitem__(self, index):
        tokens = np.random.default_rng(index).integers(0, 100, 16).astype(np.int32)
        return {"tokens": tokens, "source": ("web", "books")[index % 2]}

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    ds = mgf.score_filter(
        grain.MapDataset.source(Windows()), sys.argv[1], keep_ratio=0.25,
        windows=mgf.TextWindows("tokens"), block_windows=256, source_key="source",
    )
    ds = ds.batch(32).to_iter_dataset(grain.ReadOptions(1, 1))
    ds = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    assert len(list(ds)) == 32
    print(urllib.request.urlopen("http://127.0.0.1:9431/metrics", timeout=20).read().decode())
"""


@pytest.mark.slow
def test_counts_of_workers_add_up_on_grains_port(tmp_path):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 9431)) == 0:
            pytest.skip("grain's port 9431 is taken on this machine")
    mgf.Registry(tmp_path / "run").publish(make_scorer())
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    finished = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "run")],
        env=environment | {"ENABLE_PYGRAIN_PROMETHEUS_TELEMETRY": "true"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = dict(
        line.rsplit(" ", 1) for line in finished.stdout.splitlines() if line.startswith("metagrad")
    )
    windows = {k: float(v) for k, v in found.items() if "windows_total{" in k}
    kept = sum(v for k, v in windows.items() if 'decision="kept"' in k)
    # Workers read whole blocks; one that two of them share is counted by both.
    assert sum(windows.values()) >= 4096 and kept == sum(windows.values()) / 4
    assert {k.split('source="')[1][:-2] for k in windows} == {"web", "books"}
    tokens = sum(float(v) for k, v in found.items() if "tokens_total{" in k)
    assert tokens == 16 * sum(windows.values())
    assert found["metagrad_filter_scorer_version"] == "1.0"
    assert found["metagrad_filter_target_keep_ratio"] == "0.25"
    assert float(found["metagrad_filter_score_duration_seconds_total"]) > 0


def test_an_exporter_that_fails_never_stops_the_filter(tmp_path, monkeypatch):
    def broken():
        raise OSError("no space left")

    monkeypatch.setattr(blocks, "exported", broken)
    config = FilterConfig(
        run_dir=str(tmp_path),
        keep_ratio=Fraction(1, 4),
        windows=mgf.TextWindows("tokens"),
        block_windows=16,
        name="export-fails",
    )
    config.bind()
    with pytest.warns(RuntimeWarning, match="Prometheus does not get the filter's numbers"):
        choice = BlockFilter(config).choose(0, 0, make_elements(16))
    assert len(np.unique(choice.kept)) == 4

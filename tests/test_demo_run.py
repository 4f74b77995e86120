"""The whole job on a small synthetic world: minutes, so it is run by `make test-slow`."""

import json
from dataclasses import replace

import numpy as np
import pytest

from metagrad_filter.demo import run as demo
from metagrad_filter.demo.config import DemoConfig
from metagrad_filter.demo.data import World
from metagrad_filter.labels import LabelStore
from metagrad_filter.ledger import Ledger
from metagrad_filter.registry import Registry

pytestmark = pytest.mark.slow

CONFIG = replace(
    DemoConfig().quick(),
    window_tokens=17,
    vocab_size=64,
    blocks=4,
    base_steps=80,
    held_out_windows=128,
    report_windows=128,
    curve_windows=128,
    seeds=2,
)
CONFIG = replace(CONFIG, calibration=replace(CONFIG.calibration, horizon=8, labels=1024))


def synthetic_world(**_):
    """Two Markov chains over one alphabet, and a shuffled copy of the first."""
    rng = np.random.default_rng(0)
    chains = rng.dirichlet(np.full(64, 0.05), (2, 64))

    def sample(chain, count):
        windows = np.empty((count, 17), np.int32)
        windows[:, 0] = rng.integers(0, 64, count)
        for t in range(1, 17):
            draw = rng.random((count, 1))
            windows[:, t] = (chains[chain].cumsum(1)[windows[:, t - 1]] < draw).sum(1).clip(0, 63)
        return windows

    total = 5120
    on, off = sample(0, int(total * 0.4)), sample(1, int(total * 0.4))
    corrupt = rng.permuted(sample(0, total - len(on) - len(off)), axis=1)
    windows = np.concatenate([on, off, corrupt])
    classes = np.repeat(np.arange(3), [len(on), len(off), len(corrupt)]).astype(np.int8)
    order = rng.permutation(total)
    return World(windows[order], classes[order], sample(0, 256), 64, "{}")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "build_world", synthetic_world)
    folders = [tmp_path_factory.mktemp(f"demo-{i}") for i in range(2)]
    try:
        results = [demo.run_demo(replace(CONFIG, out=folder)) for folder in folders]
    finally:
        patch.undo()
    return folders, results


def test_results_hold_what_is_promised(two_runs):
    (folder, _), (results, _) = two_runs
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results["methods"]) == set(demo.METHODS)
    assert all(len(method["loss"]) == 2 for method in results["methods"].values())
    assert all(
        abs(sum(method["kept_share"].values()) - 1) < 1e-9 for method in results["methods"].values()
    )
    assert results["finite_difference"]["rank_correlation"] > 0.9
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 4


def test_a_second_version_is_swapped_in_at_half_of_the_stream(two_runs):
    (folder, _), (results, _) = two_runs
    assert results["stream"]["swaps"] == [{"block": 0, "version": 1}, {"block": 2, "version": 2}]
    assert [entry["first_block"] for entry in results["versions"]] == [0, 2]
    for seed in range(2):
        entries = Ledger(folder / "run", f"seed-{seed}").entries()
        assert [entries[interval].version for interval in sorted(entries)] == [1, 2]
    assert LabelStore(folder / "run").rounds() == [1, 2]


def test_the_filter_prefers_the_target(two_runs):
    _, (results, _) = two_runs
    kept = {name: method["kept_share"] for name, method in results["methods"].items()}
    assert kept["metagrad"]["on_target"] > kept["random"]["on_target"] + 0.2
    assert kept["on_target_only"]["on_target"] == 1


def test_the_same_seed_gives_the_same_run(two_runs):
    (first, second), (a, b) = two_runs
    for version in (1, 2):
        manifests = [Registry(folder / "run").manifest(version) for folder in (first, second)]
        assert manifests[0]["sha256"] == manifests[1]["sha256"]
    assert a["stream"] == b["stream"]
    for name in demo.METHODS:
        assert a["methods"][name]["kept_share"] == b["methods"][name]["kept_share"]
        assert a["methods"][name]["loss"] == b["methods"][name]["loss"]

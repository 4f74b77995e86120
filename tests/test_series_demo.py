"""The demo on time series: its world, its judging and its page; the whole job is slow."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.demo import series_run
from metagrad_filter.demo.series_arms import oracle_scores, stream_order
from metagrad_filter.demo.series_config import SHARES, SeriesDemoConfig
from metagrad_filter.demo.series_data import (
    CHANNELS,
    CORRUPT,
    NORMAL,
    RARE,
    WIND,
    StormWorld,
    Windows,
    classes_of,
    rapid_steps,
)
from metagrad_filter.demo.series_report import (
    series_markdown_table,
    series_report_html,
    series_summary_table,
)
from metagrad_filter.demo.series_world import judge, series_world
from metagrad_filter.demo.stream import kept_by
from metagrad_filter.errors import ConfigError
from metagrad_filter.ledger import Ledger

CONFIG = replace(SeriesDemoConfig().quick(), blocks=4, block_windows=256, base_steps=60)


def storms(count=900, seed=0):
    """Made-up storms: slow waves in every channel; in some the wind jumps in the second half."""
    rng = np.random.default_rng(seed)
    parts = {}
    for number, part in enumerate(SHARES):
        phase = rng.uniform(0, 6.3, (count, 1, len(CHANNELS)))
        values = np.sin(0.3 * np.arange(16)[:, None] + phase)
        values = values + rng.normal(size=values.shape) / 10
        jump = rng.random(count) < 0.2
        values[jump, 10:, WIND] += 3.0
        # In knots, as the definition of the event has them.
        rapid = np.stack([rapid_steps(25 * window[:, WIND]) for window in values])
        names = np.array([f"{part}-{i // 20}" for i in range(count)])
        start = np.arange(count) % 20
        parts[part] = Windows(
            values.astype(np.float32), rapid, classes_of(rapid), names, start, start + number
        )
    unused = cast(Any, None)
    return StormWorld(parts, CHANNELS, unused, unused)


@pytest.fixture(scope="module")
def world():
    return series_world(CONFIG, storms=storms())


def test_a_world_has_its_shares_and_keeps_targets_whole(world):
    classes = world.stream.windows.classes
    assert len(classes) == CONFIG.stream_windows
    assert np.mean(classes == RARE) == pytest.approx(0.05, abs=2e-3)
    assert np.mean(classes == CORRUPT) == pytest.approx(0.3, abs=2e-3)
    assert not {"stream"} & {name.split("-")[0] for name in world.report.series}
    target = world.target(1.5)
    assert target.weights == {"target": 1.0, "usual": 1.5}
    assert set(target.guards) == {"usual", "calibration"}
    assert len(target.gate_windows) == world.rare_gate
    assert len(target.guards["usual"].gate_windows) == world.normal_gate


def test_the_oracle_keeps_rare_windows_and_nothing_broken(world):
    order = stream_order(CONFIG, 0)
    kept = kept_by(oracle_scores(world.stream), order, CONFIG, seed=0)
    classes = world.stream.windows.classes
    assert len(kept) == CONFIG.stream_windows * CONFIG.keep_ratio
    assert not np.any(classes[kept] == CORRUPT)
    assert np.sum(classes[kept] == RARE) == np.sum(classes == RARE)
    again = kept_by(None, order, CONFIG, seed=0)
    np.testing.assert_array_equal(again, kept_by(None, order, CONFIG, seed=0))
    assert not np.array_equal(np.sort(kept), np.sort(again))


def test_a_model_is_judged_at_the_event():
    """A model that always says zero, and intervals of a known width."""
    report = storms(200).parts["report"]

    class Zero:
        def __call__(self, params, windows):
            return (windows**2).mean(axis=(1, 2))

        def points(self, params, windows):
            return windows * 0, windows == windows

        def intervals(self, params, windows, level):
            return windows * 0 - level, windows * 0 + level, windows == windows

    found = judge(cast(Any, Zero()), {}, report)
    rare, usual = report.of_class(RARE), report.of_class(NORMAL)
    assert found.rare_error == pytest.approx(
        np.mean(rare.values[rare.rapid][:, WIND] ** 2), rel=1e-4
    )
    assert found.normal_nll == pytest.approx(np.mean(usual.values**2), rel=1e-4)
    assert found.coverage == pytest.approx(np.mean(np.abs(usual.values) < 0.9), abs=1e-4)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
)
def test_the_area_under_the_curve_counts_pairs(first, second):
    pairs = [(a > b) + (a == b) / 2 for a in first for b in second]
    found = series_run.ranked_above(np.array(first, float), np.array(second, float))
    assert found == pytest.approx(np.mean(pairs))
    assert series_run.ranked_above(np.array([]), np.array([1.0])) is None


def test_rare_is_compared_with_each_way_of_breaking(world):
    classes = world.stream.windows.classes
    found = series_run.rare_against_corrupt((classes == RARE).astype(float), world.stream)
    assert set(found) == {"all", *world.stream.kind_names}
    assert found["all"] == 1.0
    assert {value for name in world.stream.kind_names for value in found[name].values()} == {1.0}
    opposite = series_run.rare_against_corrupt((classes == CORRUPT).astype(float), world.stream)
    assert opposite["all"] == 0.0


def results():
    method = {
        "normal_nll": [-0.3, -0.31],
        "coverage": [0.9, 0.91],
        "kept_share": {"normal": 0.6, "rare": 0.1, "corrupt": 0.3},
        "rare_change": -0.25,
        "prepare_seconds": 12.0,
        "score_seconds": 0.05,
        "curve": {
            "windows": [0, 384, 768],
            "rare_error": [[0.7, 0.7], [0.6, 0.61], [0.5, 0.52]],
            "normal_nll": [[-0.2, -0.2], [-0.25, -0.25], [-0.3, -0.31]],
        },
    }
    return {
        "kind": "series",
        "keep_ratio": 0.25,
        "seeds": [0, 1],
        "seconds": 100.0,
        "methods": {
            "random": method | {"rare_error": [0.7, 0.71], "rare_change": 0.0},
            "metagrad": method | {"rare_error": [0.5, 0.52]},
            "rho_loss": method | {"rare_error": [0.51, 0.5]},
            "rare_oracle": method | {"rare_error": [0.6, 0.6]},
        },
        "auroc": {
            name: {"all": 0.8, "spikes": {"0.25": 0.9, "1": 0.95}, "shift": {"0.25": 0.5, "1": 0.5}}
            for name in ("metagrad", "surprise", "rho_loss")
        },
        "histogram": {"edges": [0, 1, 2], "normal": [5, 6], "rare": [0, 3], "corrupt": [4, 1]},
        "scatter": {"label": [1, 2, 3], "score": [1, 3, 2], "class": ["normal", "rare", "corrupt"]},
        "stream": {
            "kept_share": {"normal": [0.6, 0.5], "rare": [0.1, 0.2], "corrupt": [0.3, 0.3]},
            "swaps": [{"block": 0, "version": 1}],
        },
        "scorer": {"rank_correlation": 0.6, "label_reliability": 0.4, "form": "linear"},
    }


def test_the_page_shows_the_table_the_figures_and_the_limits():
    page = series_report_html(results())
    assert page.count("<svg") == 5 and page.startswith("<!DOCTYPE html>")
    assert "0.510</b> against 0.705" in page and "-28%" in page
    assert "Rare above broken" in page and "spikes" in page
    # What is not shown: a rival that is as good, and a fault that is not told apart.
    assert "An advantage over RHO-loss at rare events" in page
    assert "for shift the scorer ranks" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_tables_hold_every_method_in_order():
    markdown = series_markdown_table(results()).splitlines()
    assert [line.split("|")[1].strip() for line in markdown[2:]] == [
        "random",
        "RHO-loss",
        "**metagradient**",
        "rare oracle",
    ]
    assert "**-25.0%**" in markdown[4] and "0.600 / 0.100 / 0.300" in markdown[3]
    assert series_summary_table(results()).row_count == 4


def test_a_page_without_results_says_so():
    assert "No figure." in series_report_html({}) and "Results of the" in series_report_html({})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"patch": 5}, "length=16.*patch=5"),
        ({"blocks": 7}, "7 blocks of 512"),
        ({"batch_windows": 100}, "even number of blocks"),
    ],
)
def test_a_configuration_out_of_its_domain_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(SeriesDemoConfig(), **fields)


def test_a_configuration_is_json():
    config = SeriesDemoConfig()
    assert json.loads(json.dumps(config.to_json()))["calibration"]["horizon"] == 96
    assert config.steps == 96 and "out" not in config.to_json()


def test_the_command_chooses_the_kind(monkeypatch):
    from metagrad_filter import cli

    command = cli.Demo(kind="series", quick=True, seeds=2)
    run, table = command._series()
    (config,) = cast(Any, run).args
    assert config == replace(SeriesDemoConfig(out=command.out).quick(), seeds=2)
    assert table is series_summary_table
    run, _ = command._text()
    assert cast(Any, run).func.__name__ == "run_demo"
    assert SimpleNamespace(**vars(cli.Demo())).kind == "text"


@pytest.mark.slow
def test_the_whole_job_runs(tmp_path):
    made = storms()
    found = series_run.run_series_demo(replace(CONFIG, out=tmp_path), storms=made)
    assert set(found["methods"]) == set(series_run.METHODS)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "report.html").read_text().count("<svg") == 5
    assert all(
        abs(sum(method["kept_share"].values()) - 1) < 1e-9 for method in found["methods"].values()
    )
    entries = Ledger(tmp_path / "run", "seed-0").entries()
    assert entries[min(entries)].version == 1
    assert found["finite_difference"]["rank_correlation"] > 0.9

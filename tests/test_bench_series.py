"""What the bench on time series computes: folds that cut no storm, merged runs, differences."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bench import series, series_demo
from metagrad_filter.demo.series_config import SeriesDemoConfig


@given(st.lists(st.sampled_from([f"storm-{i}" for i in range(12)]), min_size=1, max_size=60))
def test_a_fold_holds_storms_whole(storms):
    folds = series.fold(np.array(storms), 3)
    assert set(folds) <= {0, 1, 2}
    for storm in set(storms):
        assert len(set(folds[np.array(storms) == storm])) == 1


def test_labels_that_are_noise_of_storms_are_not_distilled():
    """Windows of a storm overlap: folds that cut storms would find 0.5 here."""
    rng = np.random.default_rng(0)
    storms = np.repeat([f"storm-{i}" for i in range(60)], 20)
    paths = rng.normal(size=(60, 40, 2)).cumsum(axis=1)
    values = np.concatenate([[path[i : i + 20] for i in range(20)] for path in paths])
    labels = np.repeat(rng.normal(size=60), 20)
    scores, correlation = series.distil(values.astype(np.float32), labels, storms)
    assert np.isfinite(scores).all() and abs(correlation) < 0.25


def run(error):
    return {
        "methods": {
            "random": {"rare_error": [4.0 * error, 2.0 * error]},
            "rare oracle": {"rare_error": [error]},
        },
        "auroc": {"x": {"all": 0.5, "noise": {"1": 0.25 * error}}},
        "rare_above_usual": {"x": 0.75},
        "reliability": {"guarded": error},
        "rank_correlation": {},
        "base": {},
        "label_seconds": 1.0,
        "groups": {"effects": {}},
        "gates": {},
        "geometry": {"base": error},
    }


def test_runs_are_merged_split_by_split():
    found = series.merged([run(1.0), run(2.0)])
    assert found["methods"]["random"]["rare_error"] == [4.0, 2.0, 8.0, 4.0]
    assert found["auroc"]["x"] == {"all": [0.5, 0.5], "noise": {"1": [0.25, 0.5]}}
    assert found["geometry"] == {"base": 1.0} and len(found["groups"]) == 2
    # Against the mean of random's two draws of each split: 1 of 3, 2 of 6.
    change = series.change(found["methods"], "rare oracle", "rare_error")
    np.testing.assert_allclose(change, [-2 / 3, -2 / 3])


def test_the_records_are_of_the_settings_that_are_shipped():
    shipped = json.loads(json.dumps(SeriesDemoConfig().to_json()))
    demo = json.loads(series_demo.RECORD.read_text())["config"]
    bench = json.loads(series.RECORD.read_text())["config"]
    for record, own in ((demo, ()), (bench, ("seeds",))):
        assert {k: record[k] for k in shipped if k not in own} == {
            k: shipped[k] for k in shipped if k not in own
        }

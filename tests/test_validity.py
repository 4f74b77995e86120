"""Validity checks: clusters of windows, tilts and half-subsets, by calibrator and by command."""

import json
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import CORRUPT, KINDS, OFF, ON, make_calibrator

from metagrad_filter import cli
from metagrad_filter.calibration.clusters import clusters_of
from metagrad_filter.errors import ConfigError

SMALL = {"horizon": 8, "batch_windows": 16, "labels": 300}


def purity(labels, kinds):
    """Share of windows that are of their cluster's most frequent kind."""
    found = [np.bincount(kinds[labels == c]).max() for c in np.unique(labels)]
    return sum(found) / len(kinds)


def test_clusters_find_windows_of_different_vocabularies():
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat([0, 1, 2], [120, 90, 60]))
    windows = (rng.integers(0, 10, (270, 30)) + 10 * kinds[:, None]).astype(np.int32)
    found = clusters_of(windows, 3)
    assert purity(found, kinds) > 0.97
    # By size, so that cluster 0 is the largest whatever the seed.
    assert (np.diff(np.bincount(found)) <= 0).all()
    again = clusters_of(windows, 3, seed=1)
    assert purity(again, kinds) > 0.97
    np.testing.assert_array_equal(found, clusters_of(windows, 3))


def test_clusters_of_series_are_by_level_and_spread():
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat([0, 1], 60))
    windows = rng.normal(size=(120, 20, 2)) * np.where(kinds, 5.0, 1.0)[:, None, None]
    windows[3, 4, 0] = np.nan
    assert purity(clusters_of(windows.astype(np.float32), 2), kinds) > 0.97


@given(count=st.integers(2, 12), distinct=st.integers(1, 12), seed=st.integers(0, 50))
def test_every_window_has_a_cluster_and_copies_share_theirs(count, distinct, seed):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 20, (distinct, 8)).astype(np.int32)
    rows = rng.integers(0, distinct, 24)
    found = clusters_of(base[rows], count, seed=seed)
    assert found.shape == (24,) and found.min() == 0 and found.max() < min(count, 24)
    for row in range(distinct):
        assert len(set(found[rows == row])) <= 1


@pytest.mark.parametrize("count", [1, 25, 2.0])
def test_a_number_of_clusters_that_cannot_be_made_is_refused(count):
    with pytest.raises(ConfigError, match="clusters="):
        clusters_of(np.zeros((24, 4), np.int32), count)


@pytest.fixture(scope="module")
def calibrator(tmp_path_factory):
    return make_calibrator(tmp_path_factory.mktemp("run"), config=SMALL)


@pytest.fixture(scope="module")
def tilt(calibrator):
    return calibrator.check("tilt", classes=KINDS, seeds=2)


def test_a_tilt_towards_the_target_helps_as_labels_say(calibrator, tilt):
    rows = {int(row["name"]): row for row in tilt.classes}
    assert set(rows) == {ON, OFF, CORRUPT}
    assert rows[ON]["effect"] > 0 > rows[OFF]["effect"]
    assert rows[ON]["predicted"] == max(row["predicted"] for row in rows.values())
    assert rows[ON]["effect"] > 2 * rows[ON]["standard_error"]
    assert tilt.validity >= 0.5 and tilt.sign_agreement >= 2 / 3
    assert tilt.reliability > 0.5 and tilt.horizon == 8 and tilt.steps == 8
    assert tilt.windows == 128 and tilt.runs == 12
    assert sum(row["share"] for row in tilt.classes) == pytest.approx(1)
    assert tilt.gradients > 12 * 8 * 16


def test_a_check_is_stored_beside_the_rounds_and_is_no_round(calibrator, tilt):
    path = calibrator.run_dir / "rounds" / "check-000001.json"
    assert json.loads(path.read_bytes()) == json.loads(json.dumps(tilt.to_json()))
    assert calibrator.reports() == [] and calibrator.registry.versions() == []
    assert calibrator.labels.rounds() == []
    assert "class tilts" in str(tilt) and "split-half reliability" in str(tilt)


def test_lds_has_an_interval_and_a_ceiling(calibrator, tilt):
    found = calibrator.check("lds", subsets=8, seeds=2, steps=4, pool_windows=64)
    assert -1 <= found.low <= found.validity <= found.high <= 1
    assert found.runs == 16 and found.steps == 4 and found.windows == 64
    assert found.ceiling is not None and 0 <= found.ceiling <= 1 and found.classes == []
    assert (calibrator.run_dir / "rounds" / "check-000002.json").exists()
    assert "linear datamodeling score" in str(found)


def test_labels_without_randomness_have_validity_and_no_reliability(tmp_path):
    found = make_calibrator(tmp_path, config={**SMALL, "estimator": "loss"}).check(seeds=1)
    assert found.reliability is None and "reliability none" in str(found)
    assert found.horizon is None and len(found.classes) == 6
    json.dumps(found.to_json(), allow_nan=False)  # one seed has no standard error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "guess"}, "kind='guess'; expected 'tilt' or 'lds'"),
        ({"classes": [1, 2]}, r"classes have shape \(2,\); expected \(1200,\)"),
        ({"clusters": 1}, "clusters=1"),
    ],
)
def test_what_cannot_be_checked_is_refused(calibrator, arguments, message):
    with pytest.raises(ConfigError, match=message):
        calibrator.check(**arguments)


def test_the_command_prints_validity_beside_reliability(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_checked.py").write_text(
        textwrap.dedent(f"""
            from test_validity import SMALL
            from test_calibration import make_calibrator

            def calibrator():
                return make_calibrator({str(tmp_path / "run")!r}, config=SMALL)
            """)
    )
    settings = tmp_path / "calibrate.toml"
    settings.write_text(
        f"run_dir = {str(tmp_path / 'run')!r}\nsetup = 'own_checked:calibrator'\n"
        "[worker]\nniceness = 0\n"
    )
    assert cli.main(["calibrate", str(settings), "--check", "tilt", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["kind"] == "tilt" and len(found["classes"]) == 6
    assert "class tilts" in printed.err and "split-half" in printed.err
    assert list((tmp_path / "run" / "rounds").iterdir()) == [
        tmp_path / "run" / "rounds" / "check-000001.json"
    ]
    assert cli.main(["calibrate", str(settings), "--check", "tilt", "--watch"]) == 2
    assert "--check runs no rounds" in capsys.readouterr().err

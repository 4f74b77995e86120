"""The doctor: what it sees of an installation, and whether its verdicts follow the model."""

import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from doctor_setups import CONFIG, proxy, stream, target

import metagrad_filter as mgf
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.doctor import (
    Row,
    examine,
    examine_small_world,
    inspect_installation,
    load_setup,
)
from metagrad_filter.doctor import installation as installation_module
from metagrad_filter.doctor.small_world import KINDS, LENGTH, VOCAB, small_world
from metagrad_filter.errors import ConfigError

NAMES = [
    "adjoint against autodiff, relative error",
    "finite differences, rank correlation",
    "finite differences, relative error",
    "metasmoothness",
    "split-half reliability of the probe",
    "linear datamodeling score",
]


def examined(start, **changes):
    config = replace(CONFIG, **changes)
    return {row.name: row for row in examine(start, target(), WindowSource(stream()), config)}


def test_a_sound_model_passes_every_check():
    rows = examined(proxy())
    assert list(rows) == NAMES
    assert all(row.passed for row in rows.values()), [str(row) for row in rows.values()]
    assert all(row.value is not None for row in rows.values())
    assert "6 steps" in rows[NAMES[1]].detail


def test_a_rate_at_which_the_inner_loop_diverges_fails_without_a_crash():
    wild = replace(proxy(), learning_rate=1e38)
    rows = examined(wild, horizon=4)
    assert rows and not any(row.passed for row in rows.values())
    lines = [str(row) for row in rows.values()]
    assert all("\n" not in line for line in lines)
    assert any("finite" in line for line in lines)


@pytest.mark.parametrize(
    ("subsets", "windows", "message"),
    [(2, 200, "subsets=2"), (24, 31, "31 windows; expected at least 32")],
)
def test_examine_refuses(subsets, windows, message):
    source = WindowSource(stream()[:windows])
    with pytest.raises(ConfigError, match=message):
        examine(proxy(), target(), source, CONFIG, subsets=subsets)


def test_a_row_reads_as_one_line():
    row = Row("metasmoothness", 0.5, ">= 0.9", False, "lower the rate")
    assert str(row) == "metasmoothness: 0.5, expected >= 0.9; lower the rate"
    assert "no value" in str(replace(row, value=None))


# ---- installation


def test_installation_names_versions_devices_and_memory():
    found = inspect_installation()
    assert found["problems"] == []
    assert found["versions"]["jax"] == jax.__version__
    assert {"python", "optax", "flax", "grain"} <= {*found["versions"]}
    assert found["devices"][0].startswith("cpu")
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    assert found["native_scorer"]["loaded"] == (found["native_scorer"]["reason"] is None)


def test_the_reason_for_numpy_is_named(monkeypatch):
    monkeypatch.setenv("METAGRAD_FILTER_NO_NATIVE", "1")
    found = inspect_installation()["native_scorer"]
    assert not found["loaded"] and "METAGRAD_FILTER_NO_NATIVE=1" in found["reason"]
    assert inspect_installation()["problems"] == []


def test_a_native_module_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setattr(installation_module, "_NATIVE", "metagrad_filter.kernels.scorer._absent")
    found = inspect_installation()["native_scorer"]
    assert not found["loaded"] and "_absent" in found["reason"]


def test_a_missing_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(installation_module, "_PACKAGES", ("jax", "no-such-package-here"))
    found = inspect_installation()
    assert found["versions"]["no-such-package-here"] is None
    assert found["problems"] == [
        "no-such-package-here is not installed; reinstall metagrad-filter."
    ]


# ---- setup


def test_setup_is_found_and_called():
    found = load_setup("doctor_setups:sound")
    assert isinstance(found, mgf.Calibrator)
    assert found.config == CONFIG


def test_setup_is_looked_for_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "own_training.py").write_text("from doctor_setups import sound\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_setup("own_training:sound"), mgf.Calibrator)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("doctor_setups", "expected package.module:function"),
        ("doctor_setups:", "expected package.module:function"),
        (":sound", "expected package.module:function"),
        ("doctor setups:sound", "expected package.module:function"),
        ("doctor_setups:sound()", "expected package.module:function"),
        ("no_such_module_here:f", "importing no_such_module_here raised ModuleNotFoundError"),
        ("doctor_setups:number", r"no function number; it has .*'sound'"),
        ("doctor_setups:absent", "no function absent"),
        ("doctor_setups:wrong", "returned a int; expected a Calibrator"),
        ("doctor_setups:broken", "raised KeyError: 'checkpoint'"),
    ],
)
def test_wrong_setups_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_setup(spec)


def test_a_module_that_does_not_import_is_named(tmp_path, monkeypatch):
    (tmp_path / "own_broken.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing own_broken raised ModuleNotFoundError"):
        load_setup("own_broken:sound")


# ---- the built-in world


@pytest.mark.slow
def test_the_small_world_is_what_it_says():
    world = small_world(count=2048)
    assert world.windows.shape == (2048, LENGTH)
    assert world.windows.min() >= 0 and world.windows.max() < VOCAB
    assert np.bincount(world.kinds) / 2048 == pytest.approx([0.4, 0.4, 0.2], abs=0.05)
    losses = np.asarray(jax.jit(world.proxy.loss)(world.proxy.params, world.windows))
    by_kind = {name: losses[world.kinds == i].mean() for i, name in enumerate(KINDS)}
    # In mid-training: it tells text from shuffled text, and has far to go.
    assert by_kind["good"] < by_kind["corrupt"] - 0.1
    assert by_kind["good"] > 1.5
    # The corrupt windows hold the good ones' tokens: only their order is lost.
    assert by_kind["corrupt"] > np.log(VOCAB) - 0.5


@pytest.mark.slow
def test_the_built_in_decoder_passes():
    rows = examine_small_world()
    assert [row.name for row in rows] == NAMES
    assert all(row.passed for row in rows), [str(row) for row in rows]

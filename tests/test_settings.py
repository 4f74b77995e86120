"""The settings file of a calibrator beside training, and the limits of its process."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.limits import Limits
from metagrad_filter.calibration.monitoring import Monitoring
from metagrad_filter.calibration.settings import Schedule, Settings, example
from metagrad_filter.errors import ConfigError

HEAD = 'run_dir = "run"\nsetup = "doctor_setups:sound"\n'


def test_the_example_reads_as_the_defaults():
    found = Settings.parse(example())
    assert CalibrationConfig(**found.calibration) == CalibrationConfig()
    assert found.worker == Limits() and found.schedule == Schedule()
    assert found.monitor == Monitoring()
    assert Settings.parse(HEAD) == Settings("run", "doctor_setups:sound")


def test_the_example_names_every_setting():
    text = example()
    for kind in (CalibrationConfig, Limits, Schedule, Monitoring):
        for field in dataclasses.fields(kind):
            assert f"\n{field.name} =" in text or f"\n# {field.name} =" in text, field.name


def test_a_file_sets_what_it_names(tmp_path):
    path = tmp_path / "calibrate.toml"
    path.write_text(
        HEAD
        + "[calibration]\nhorizon = 12\nkeep_ratio = 0.5\ngate_strengths = [1, inf]\n"
        + "maximum_rise = 1\n"
        + '[worker]\nniceness = 3\nthreads = 2\ndevice = "cpu"\n'
        + "[schedule]\nrounds = 4\npause_seconds = 30\nevery_steps = 100\non_drift = true\n"
        + '[monitor]\nprometheus_port = 9432\ntriggers = ["psi", "age"]\nmax_age_blocks = 9\n'
    )
    found = Settings.load(path)
    assert found.calibration == {
        "horizon": 12,
        "keep_ratio": 0.5,
        "gate_strengths": (1.0, math.inf),
        "maximum_rise": 1.0,
    }
    assert found.worker == Limits(3, 2, "cpu")
    assert found.schedule == Schedule(4, 30.0, 100, True)
    assert found.monitor == Monitoring(9432, triggers=("psi", "age"), max_age_blocks=9)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "horizon": st.integers(1, 10**6),
            "keep_ratio": st.floats(0.01, 0.99),
            "minimum_reliability": st.floats(-0.9, 1.0),
            "microbatch": st.integers(1, 4096),
            "gate_strengths": st.lists(st.floats(0.1, math.inf), min_size=1, max_size=4),
        },
    )
)
def test_whatever_is_valid_is_read_as_it_was_written(values):
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    found = Settings.parse(HEAD + "[calibration]\n" + "\n".join(lines)).calibration
    expected = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir = ", "not TOML"),
        ('setup = "a:b"', "run_dir is missing"),
        ('run_dir = "a"', "setup is missing"),
        ('run_dir = ""\nsetup = "a:b"', "run_dir=''; expected a text"),
        ('run_dir = 3\nsetup = "a:b"', "run_dir=3; expected a text"),
        (HEAD + "workers = 3", "workers is no setting; did you mean worker?"),
        (HEAD + "zzz = 3", r"zzz is no setting; expected one of \['calibration'"),
        (HEAD + "worker = 3", r"worker=3; expected a table, \[worker\]"),
        (HEAD + "[calibration]\nhorizn = 3", r"\[calibration\] horizn is no .* mean horizon?"),
        (HEAD + "[worker]\nnicenes = 3", r"\[worker\] nicenes is no setting; did you mean nicen"),
        (HEAD + "[calibration]\nhorizon = 1.5", "horizon is 1.5, a number; expected an integer"),
        (HEAD + "[calibration]\nhorizon = true", "horizon is True, true or false; expected an"),
        (HEAD + '[calibration]\nkeep_ratio = "a"', "keep_ratio is 'a', a text; expected a number"),
        (HEAD + "[calibration]\ngate_strengths = 2.0", "gate_strengths is 2.0.*expected an array"),
        (HEAD + '[calibration]\ngate_strengths = ["a"]', "gate_strengths item is 'a'"),
        (HEAD + "[calibration]\nhorizon = 0", "horizon=0; expected an integer >= 1"),
        (HEAD + "[calibration]\nseed = 2020-01-01", "seed is .* a date or time; expected an"),
        (HEAD + "[worker]\nthreads = 0", "threads=0; expected a positive integer"),
        (HEAD + "[worker]\nniceness = 20", "niceness=20; expected an integer from 0 to 19"),
        (HEAD + '[worker]\ndevice = "tpu"', "device='tpu'; expected 'cpu', 'gpu', the index"),
        (HEAD + "[worker]\ndevice = -1", "device=-1"),
        (HEAD + "[worker]\ndevice = true", "device is True"),
        (HEAD + "[schedule]\nrounds = 0", "rounds=0"),
        (HEAD + "[schedule]\nevery_steps = 0", "every_steps=0"),
        (HEAD + "[schedule]\npause_seconds = -1", "pause_seconds=-1"),
        (HEAD + "[schedule]\npause_seconds = nan", "pause_seconds=nan"),
        (HEAD + "[schedule]\nmost_failures = 0", "most_failures=0; expected a positive integer"),
        (HEAD + "[monitor]\nleevl = 0.01", r"\[monitor\] leevl is no setting; did you mean level"),
        (HEAD + "[monitor]\nlevel = 0.5", r"level is 0.5, expected a number in \[1e-06, 0.1\]"),
        (HEAD + '[monitor]\ntriggers = ["moon"]', "triggers holds 'moon'; expected some of"),
        (HEAD + "[monitor]\nprometheus_port = -1", "prometheus_port=-1; expected a port"),
        (HEAD + "[schedule]\non_drift = 1", "on_drift is 1, an integer; expected true or false"),
    ],
)
def test_what_is_not_expected_is_named(tmp_path, text, message):
    path = tmp_path / "calibrate.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"calibrate.toml: .*{message}"):
        Settings.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        Settings.load(tmp_path / "missing.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.toml"):
        Settings.load(tmp_path / "bytes.toml")


def test_settings_made_in_python_are_held_to_the_same():
    with pytest.raises(ConfigError, match="did you mean horizon"):
        Settings("run", "a:b", {"horizn": 3})
    with pytest.raises(ConfigError, match="threads=0"):
        Limits(threads=0)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), {}),
        (Limits(threads=2), {"NPROC": "2", "OMP_NUM_THREADS": "2"}),
        (Limits(threads=1), {"XLA_FLAGS": "--x --xla_cpu_multi_thread_eigen=false"}),
        (Limits(device="cpu"), {"JAX_PLATFORMS": "cpu"}),
        (Limits(device=0), {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda,cpu"}),
        (Limits(device="gpu"), {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    ],
)
def test_limits_are_environment_variables(limits, expected):
    found = limits.environment("--x")
    assert expected.items() <= found.items()
    assert (found == {}) == (expected == {})
    assert "CUDA_VISIBLE_DEVICES" not in found or type(limits.device) is int


PROGRAM = """
import json, os, sys
from collections import Counter
from metagrad_filter.calibration.settings import Settings
import metagrad_filter.calibration.watch
before = "jax" in sys.modules
settings = Settings.parse(sys.argv[1])
settings.worker.apply()
import jax
x = jax.numpy.ones((600, 600))
(x @ x).block_until_ready()
tasks = os.listdir("/proc/self/task")
names = Counter(open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks)
print(json.dumps([before, names.get("tf_XLAEigen", 0), os.nice(0), jax.default_backend()]))
try:
    settings.worker.apply()
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_limits_hold_in_a_process_that_applies_them_first():
    found = {}
    for threads in (1, 5):
        text = HEAD + f'[worker]\nthreads = {threads}\nniceness = 7\ndevice = "cpu"\n'
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, text], capture_output=True, text=True, check=True
        )
        facts, refusal = done.stdout.splitlines()
        imported, found[threads], niceness, backend = json.loads(facts)
        assert not imported and niceness >= 7 and backend == "cpu"
        assert "JAX has started in this process" in refusal
    assert found == {1: 1, 5: 5}


def test_the_run_directory_has_to_be_the_calibrators(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    settings = Settings(str(tmp_path / "elsewhere"), "doctor_setups:sound")
    with pytest.raises(ConfigError, match="expected the same run directory in both"):
        settings.calibrator()


def test_the_example_is_toml_without_help():
    tomllib.loads(example())

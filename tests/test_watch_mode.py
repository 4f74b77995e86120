"""Calibration beside training: when rounds begin, and what a killed or failing process leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from doctor_setups import CONFIG, proxy, stream, target

import metagrad_filter as mgf
from metagrad_filter.calibration import watch as module
from metagrad_filter.calibration.lease import Lease
from metagrad_filter.calibration.settings import Schedule, Settings
from metagrad_filter.calibration.watch import Watch, request_round, watch
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.labels import LabelStore
from metagrad_filter.spool import Spool, SpooledWindows

TESTS = Path(__file__).parent
SMALL = replace(
    CONFIG,
    horizon=4,
    labels=120,
    gate_steps=4,
    gate_pairs=2,
    gate_strengths=(float("inf"),),
    gate_margin=0.0,
    minimum_reliability=-0.9,
    block_windows=64,
)


def small(run_dir, **changes):
    """A calibrator whose rounds take a second once compiled."""
    arguments = {"windows": stream(), "config": SMALL, "proxy": proxy()} | changes
    return mgf.Calibrator(run_dir, target=target(), **arguments)


def looking(calibrator, schedule, **options):
    lines = []
    quick: dict[str, Any] = {"look_seconds": 0.02, "least_seconds": 0.01}
    if schedule.most_failures is None:
        schedule = replace(schedule, most_failures=5)  # a test fails rather than go on for ever
    return Watch(calibrator, schedule, say=lines.append, **(quick | options)), lines


def in_thread(loop):
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    return thread


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def failures(run_dir):
    paths = sorted((run_dir / "rounds").glob("failed-*.json"))
    return [json.loads(path.read_bytes()) for path in paths]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A run directory after one watched round, its lines, and its calibrator."""
    run_dir = tmp_path_factory.mktemp("calibrated")
    calibrator = small(run_dir)
    loop, lines = looking(calibrator, Schedule(rounds=1))
    assert loop.run() == 1
    return run_dir, lines, calibrator


def test_the_first_round_is_due_at_once_and_is_told_of(calibrated):
    run_dir, lines, calibrator = calibrated
    assert mgf.Registry(run_dir).versions() == [1]
    assert lines == [
        "holding the lease",
        "a round begins: the first round",
        "round 1 published version 1 of strength inf",
        "done after 1 rounds",
    ]
    # The lease is free, and the calibrator is as it was given.
    with Lease(run_dir).holding():
        pass
    assert failures(run_dir) == [] and calibrator.reports()[0]["version"] == 1


# When a round is due.


def test_the_pause_of_a_restarted_process_begins_anew(calibrated):
    loop, _ = looking(calibrated[2], Schedule(pause_seconds=1e6))
    assert loop.due() == ""
    loop, _ = looking(calibrated[2], Schedule())
    assert loop.due() == "the schedule"


def test_steps_of_training_make_a_round_due(tmp_path, calibrated):
    trainer, watcher = small(tmp_path), small(tmp_path)
    watcher.observe()
    loop, _ = looking(watcher, Schedule(every_steps=100))
    assert loop.due() == "the first round"
    loop._first, loop._last_step = False, 50
    assert loop.due() == ""
    for step, expected in ((149, ""), (150, "training is at step 150"), (20, "")):
        trainer.follow(step, trainer.proxy.params, trainer.proxy.opt_state)
        assert watcher.live_step() == step and loop.due() == expected
    loop._last_step = 200  # the job was set back
    assert loop.due() == "training is at step 20"
    with pytest.raises(ConfigError, match="observes the states of another process"):
        watcher.follow(1, {})


def test_a_watching_process_starts_from_states_that_another_hands_over(tmp_path):
    trainer, watcher = small(tmp_path), small(tmp_path)
    watcher.observe()
    broken = {"table": jnp.full_like(proxy().params["table"], jnp.nan)}
    trainer.follow(7, broken, proxy().opt_state)
    report = watcher.round()
    # The marker of the state is that it cannot be calibrated.
    assert report.live_step == 7 and report.reason.startswith("non-finite")


def test_a_request_is_due_whatever_the_schedule_says_and_is_removed_once_served(calibrated):
    run_dir, _, calibrator = calibrated
    loop, _ = looking(calibrator, Schedule(on_drift=True))
    assert loop.due() == ""
    path = request_round(run_dir, "scores have drifted", psi=0.4)
    assert json.loads(path.read_bytes()) == {"reason": "scores have drifted", "psi": 0.4}
    assert loop.due() == "asked for: scores have drifted"
    (run_dir / "requests" / "0.json").write_bytes(b"{")
    assert loop.due() == "asked for: 0.json"
    loop, lines = looking(calibrator, Schedule(rounds=1, on_drift=True))
    assert loop.run() == 1
    assert list((run_dir / "requests").iterdir()) == []
    assert lines[1].startswith("a round begins: asked for")


def test_a_spool_with_too_few_windows_is_waited_for(tmp_path):
    windows = stream()
    calibrator = small(tmp_path, windows=SpooledWindows(tmp_path))
    assert calibrator.missing_windows() == 100
    with pytest.raises(WindowError, match="holds 0 windows, 100 fewer than a round begins with"):
        calibrator.round()
    loop, lines = looking(calibrator, Schedule(rounds=1))
    thread = in_thread(loop)
    until(lambda: "waiting for the filter to spool more windows" in lines)
    spool = Spool(tmp_path, share=1.0)
    spool.offer(0, windows[:60])
    spool.flush()
    until(lambda: len(calibrator.source) == 60)
    assert calibrator.reports() == []
    spool.offer(1, windows[60:])
    spool.flush()
    until(lambda: not thread.is_alive())
    assert calibrator.reports()[0]["version"] == 1
    assert len(LabelStore(tmp_path).load(1).windows) > 60


# What goes wrong.


class Trouble:
    """Rounds of a real calibrator that raise first."""

    def __init__(self, calibrator, errors):
        self.round_, self.errors = calibrator.round, list(errors)
        calibrator.round = self

    def __call__(self, lease=None):
        if self.errors:
            raise self.errors.pop(0)
        return self.round_(lease)


def test_failures_are_recorded_and_backed_off_from(tmp_path):
    calibrator = small(tmp_path)
    Trouble(calibrator, [RuntimeError("out of memory"), OSError(errno.ENOSPC, "disk full")])
    request = request_round(tmp_path, "drift")
    loop, lines = looking(calibrator, Schedule(rounds=1))
    assert loop.run() == 1
    tried = [line.split(" s: ")[0] for line in lines if "is tried in" in line]
    assert [line.split()[-1] for line in tried] == ["0.02", "0.04"]  # 2 and 4 times the least
    found = failures(tmp_path)
    assert [f["error"] for f in found] == ["RuntimeError", "OSError"]
    assert found[0]["message"] == "out of memory" and "Traceback" in found[0]["traceback"]
    assert [f["failures_in_a_row"] for f in found] == [1, 2]
    assert any("out of memory" in line and "is tried in" in line for line in lines)
    assert calibrator.reports()[0]["round"] == 1 and not request.exists()


def test_the_back_off_ends_at_ten_minutes(calibrated):
    loop, _ = looking(calibrated[2], Schedule(), least_seconds=1.0)
    waits = [loop._delay(times) for times in range(1, 2001)]
    assert waits[:10] == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 600.0]
    assert set(waits[10:]) == {600.0}


def test_a_schedule_may_end_with_the_last_of_several_failures(tmp_path):
    calibrator = small(tmp_path)
    Trouble(calibrator, [RuntimeError("first"), RuntimeError("second"), RuntimeError("third")])
    loop, _ = looking(calibrator, Schedule(most_failures=2))
    with pytest.raises(RuntimeError, match="second"):
        loop.run()
    assert [f["message"] for f in failures(tmp_path)] == ["first", "second"]
    with Lease(tmp_path).holding():  # it is free
        pass


@pytest.mark.slow
def test_a_disk_that_is_full_for_reports_too_ends_nothing(tmp_path, monkeypatch):
    calibrator = small(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    Trouble(calibrator, [full])

    def refuse(path, data):
        raise full

    monkeypatch.setattr(module, "write_once", refuse)
    loop, _ = looking(calibrator, Schedule(rounds=1))
    with pytest.warns(RuntimeWarning, match="cannot be recorded.*No space left"):
        assert loop.run() == 1
    assert mgf.Registry(tmp_path).versions() == [1]


def test_a_disk_that_is_full_while_labels_are_stored_costs_that_round_only(tmp_path, monkeypatch):
    calibrator = small(tmp_path)
    write, failed = LabelStore.append, []

    def once(self, number, labels):
        if not failed:
            failed.append(number)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, number, labels)

    monkeypatch.setattr(LabelStore, "append", once)
    loop, _ = looking(calibrator, Schedule(rounds=1))
    assert loop.run() == 1
    assert failures(tmp_path)[0]["message"].endswith("No space left on device")
    assert LabelStore(tmp_path).rounds() == [1] and mgf.Registry(tmp_path).versions() == [1]


@pytest.mark.slow
def test_a_round_that_diverges_is_backed_off_from_too(tmp_path):
    calibrator = small(tmp_path, proxy=replace(proxy(), learning_rate=1e4))
    loop, lines = looking(calibrator, Schedule(rounds=2))
    assert loop.run() == 2
    tried = [line.split(" s: ")[0] for line in lines if "is tried in" in line]
    assert [line.split()[-1] for line in tried] == ["0.02", "0.04"]
    assert any("published nothing: diverged" in line for line in lines)
    # Numbers go on, for a rejection is a trace.
    assert [report["round"] for report in calibrator.reports()] == [1, 2]


def test_a_second_one_waits_and_goes_on_where_the_first_ends(calibrated, tmp_path):
    calibrator = small(tmp_path)
    first = Lease(tmp_path)
    assert first.acquire(0)
    with pytest.raises(ConfigError, match="is being calibrated by process"):
        calibrator.round()
    loop, lines = looking(calibrator, Schedule(rounds=1))
    thread = in_thread(loop)
    until(lambda: any("is being calibrated by process" in line for line in lines))
    assert calibrator.reports() == []
    first.release()
    thread.join(60)
    assert [report["version"] for report in calibrator.reports()] == [1]


def test_a_lease_that_is_lost_ends_the_round_before_it_publishes(tmp_path):
    calibrator = small(tmp_path)
    lease = Lease(tmp_path)
    assert lease.acquire(0)

    def lose(stage, done, total):
        if stage == "gate":
            lease._held = False

    calibrator.progress = lose
    with pytest.raises(mgf.CalibrationFailed, match=r"took .* over"):
        calibrator.round(lease)
    lease._held = True
    lease.release()
    assert mgf.Registry(tmp_path).versions() == []
    assert calibrator.round().round == 2  # labels of round 1 are there


def test_clocks_that_jump_change_nothing(tmp_path, monkeypatch):
    jumps = iter([86400.0, -86400.0, 2.0**31] * 10**4)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    loop, _ = looking(small(tmp_path), Schedule(rounds=2, pause_seconds=0.1))
    assert loop.run() == 2
    assert failures(tmp_path) == [] and mgf.Registry(tmp_path).versions() == [1, 2]


# In a process of its own, which is killed.

PROGRAM = """
import os, signal, sys
from metagrad_filter import store
from metagrad_filter.calibration import calibrator
from metagrad_filter.calibration.settings import Settings
from metagrad_filter.calibration.watch import watch

stage = sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def progress(name, done, total):
    print("stage", name, flush=True)
    if name == stage and done:
        die()

write = store.LocalStore.write_once

def half(self, key, data):
    written = write(self, key, data)
    if key.startswith("registry/") and key.endswith("safetensors"):
        die()
    return written

if stage == "publish":
    store.LocalStore.write_once = half
if stage == "report":
    calibrator.write_once = lambda path, data: die()
watch(Settings.parse(sys.argv[1]), progress=progress, say=lambda line: print(line, flush=True))
"""


def settings_text(tmp_path, extra=""):
    (tmp_path / "own_watched.py").write_text(
        "from test_watch_mode import small\n"
        f"def calibrator():\n    return small({str(tmp_path / 'run')!r})\n"
    )
    return (
        f"run_dir = {str(tmp_path / 'run')!r}\nsetup = 'own_watched:calibrator'\n"
        f"[worker]\nniceness = 1\nthreads = 1\ndevice = 'cpu'\n{extra}"
    )


def start(tmp_path, stage, extra=""):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, settings_text(tmp_path, extra), stage],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


STAGES = ["trajectories", "labels", "fit", "gate", "publish", "report"]


QUICK = "publish"


@pytest.mark.parametrize(
    "stage", [s if s == QUICK else pytest.param(s, marks=pytest.mark.slow) for s in STAGES]
)
def test_a_killed_process_leaves_whole_files_and_the_next_one_goes_on(tmp_path, stage):
    run_dir = tmp_path / "run"
    request = request_round(run_dir, "drift")
    with start(tmp_path, stage) as process:
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    store, registry = LabelStore(run_dir), mgf.Registry(run_dir)
    assert store.rounds() == ([] if STAGES.index(stage) < 2 else [1])
    assert registry.versions() == ([1] if stage == "report" else [])
    for number in store.rounds():
        assert np.isfinite(store.load(number).halves).all()
    assert request.exists() and failures(run_dir) == []
    before = set(store.rounds())
    # The lease is free at once, and the request is served.
    loop, _ = looking(small(run_dir), Schedule(rounds=1))
    assert loop.run() == 1 and not request.exists()
    report = small(run_dir).reports()[-1]
    assert report["round"] not in before and report["version"] > (stage == "report")
    versions = registry.versions()
    assert versions == sorted(set(versions))
    for version in versions:
        registry.load(version)
    assert set(store.rounds()) == before | {report["round"]}


def test_sigterm_ends_it_cleanly_in_the_midst_of_a_round(tmp_path):
    with start(tmp_path, "none") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("stage trajectories"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 0
    assert "stopped" in rest
    run_dir = tmp_path / "run"
    assert not (run_dir / "lease" / "holder.json").exists()
    assert mgf.Registry(run_dir).versions() == [] and failures(run_dir) == []


def test_one_round_here_and_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = settings_text(tmp_path).split("[worker]")[0] + "[worker]\nniceness = 0\n"
    lines = []
    assert watch(Settings.parse(text), once=True, say=lines.append) == 1
    assert lines == ["round 1 published version 1 of strength inf"]
    with Lease(tmp_path / "run").holding(), pytest.raises(ConfigError, match="being calibrated"):
        watch(Settings.parse(text), once=True)

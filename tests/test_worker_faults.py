"""What becomes of a run when the calibrating process is killed anywhere, or its machine misbehaves.

After each fault: every version verifies, labels of finished rounds are as they were, the stream of
the filter is that of an undisturbed run, and the next round works.

Kills are real: a process forks children that have imported everything and computed nothing, and
each child kills itself at its n-th sign of progress or change of the file system.
"""

import ast
import errno
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
import pytest
from doctor_setups import proxy, stream
from test_unattended import QUICK, Stream, publish
from test_watch_mode import SMALL, failures, in_thread, looking, settings_text, small, start, until

import metagrad_filter as mgf
from metagrad_filter.calibration.requests import request_round, waiting_requests
from metagrad_filter.calibration.settings import Schedule
from metagrad_filter.calibration.watch import Watch
from metagrad_filter.labels import LabelStore
from metagrad_filter.monitor.records import read_alarms
from metagrad_filter.spool import Spool, SpooledWindows
from metagrad_filter.store import open_store

TESTS = Path(__file__).parent
CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Changes:
    """Calls `strike` before each change that this thread makes under a folder.

    An audit hook sees what python opens, renames, links and removes, whoever does it; it cannot be
    taken away again, so there is one, and it is switched.
    """

    hooked = False
    current: "Changes | None" = None

    def __init__(self, folder, strike):
        self.folder, self.strike = str(folder), strike
        self.thread = threading.get_ident()
        self.real_write = os.write

    def __enter__(self):
        if not Changes.hooked:
            Changes.hooked = True
            sys.addaudithook(Changes._hook)
        Changes.current = self
        os.write = self._write
        return self

    def __exit__(self, *exc):
        Changes.current = None
        os.write = self.real_write

    @staticmethod
    def _hook(event, args):
        current = Changes.current
        if current is None or threading.get_ident() != current.thread:
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(path, str | bytes | os.PathLike) or not flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            ):
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        if os.fspath(path).startswith(current.folder) if isinstance(path, str | Path) else False:
            current.strike(None, b"")

    def _write(self, handle, data):
        if handle > 2 and threading.get_ident() == self.thread:
            self.strike(handle, data)
        return self.real_write(handle, data)


# Killed anywhere.


def child(run_dir, nth):
    """One round of the loop in this process, which dies at the nth sign of life."""
    count = [0]

    def strike(handle, data):
        count[0] += 1
        if count[0] == nth:
            if handle is not None:
                changes.real_write(handle, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    request_round(run_dir, "a round", key="sweep")
    changes = Changes(run_dir, strike)
    calibrator = small(run_dir)
    calibrator.progress = lambda stage, done, total: strike(None, b"")
    with changes:
        schedule = Schedule(rounds=1, on_drift=True, most_failures=3)
        Watch(calibrator, schedule, monitor=QUICK, look_seconds=0.02, least_seconds=0.01).run()


def forks(run_dir):
    """Reads numbers from standard input; answers each with how the child ended that it names."""
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(run_dir, int(line))
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                code = 1
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Forks:
    def __init__(self, run_dir, cache):
        environment = {
            **os.environ,
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        code = "import sys; from test_worker_faults import forks; forks(sys.argv[1])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def run(self, nth):
        assert self.process.stdin is not None and self.process.stdout is not None
        print(nth, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def kept_by(run_dir, name, swap_every_blocks):
    """A filter over a fixed stream, in this process."""
    rng = np.random.default_rng(11)
    windows = rng.integers(0, 8, (2400, 7), dtype=np.int32)
    elements = [{"tokens": w, "index": i} for i, w in enumerate(windows)]
    ds = grain.MapDataset.source(elements).to_iter_dataset(IN_PROCESS)
    return mgf.score_filter(
        ds,
        run_dir,
        keep_ratio=0.25,
        windows=mgf.TextWindows("tokens"),
        block_windows=20,
        swap_every_blocks=swap_every_blocks,
        name=name,
    )


def ids(elements):
    return [int(element["index"]) for element in elements]


def first_version(run_dir):
    table = np.random.default_rng(4).normal(size=(64, 1)).astype(np.float32)
    assert mgf.Registry(run_dir).publish(mgf.Scorer(8, 1, table=table, strength=2.0)) == 1


class Sound:
    """Looks at a run directory after each fault."""

    def __init__(self, run_dir):
        self.run_dir, self.labels, self.versions = run_dir, {}, []

    def check(self):
        registry, store = mgf.Registry(self.run_dir), LabelStore(self.run_dir)
        versions = registry.versions()
        assert versions[: len(self.versions)] == self.versions  # none is lost
        for version in versions:
            registry.load(version)
        self.versions = versions
        for number in store.rounds():
            labels = store.load(number)
            assert np.isfinite(labels.halves).all()
            data = (store.folder / f"round-{number:06d}.npz").read_bytes()
            assert self.labels.setdefault(number, data) == data
        assert set(self.labels) <= set(store.rounds())
        for path in (self.run_dir / "rounds").glob("*.json"):
            json.loads(path.read_bytes())
        numbers = [int(p.stem[6:]) for p in (self.run_dir / "rounds").glob("round-*.json")]
        assert len(numbers) == len(set(numbers))
        for path in waiting_requests(self.run_dir):
            json.loads(path.read_bytes())
        assert read_alarms(open_store(self.run_dir))[1] <= 1  # at most the line it died in


def sweep(tmp_path, steps):
    """Kills a child at each of the steps, looks after each, and ends with one that lives."""
    run_dir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    for folder in (run_dir, undisturbed):
        first_version(folder)
    beside = iter(kept_by(run_dir, "beside", 4))
    pinned = iter(kept_by(run_dir, "pinned", 10**6))
    expected = ids(kept_by(undisturbed, "pinned", 10**6))
    drifting = Stream(run_dir, "drifting").go_on(20)
    sound, kept, kept_pinned, killed, code = Sound(run_dir), [], [], 0, None
    with Forks(run_dir, tmp_path / "cache") as forked:
        for nth in steps:
            code = forked.run(nth)
            assert code in (0, -signal.SIGKILL)
            sound.check()
            drifting.go_on(1, shift=100.0 * (nth % 7 > 3))
            kept += [int(next(beside)["index"]) for _ in range(2)]
            kept_pinned += [int(next(pinned)["index"]) for _ in range(2)]
            if code == 0:
                break
            killed += 1
        before = len(sound.versions), len(list((run_dir / "rounds").glob("round-*.json")))
        assert forked.run(10**9) == 0
        sound.check()
    after = len(sound.versions), len(list((run_dir / "rounds").glob("round-*.json")))
    assert after[1] == before[1] + 1 and after[0] >= before[0]
    kept, kept_pinned = kept + ids(beside), kept_pinned + ids(pinned)
    assert kept_pinned == expected
    # What the ledger says replays the stream that swapped versions while processes were killed.
    assert ids(kept_by(run_dir, "beside", 4)) == kept
    del beside, pinned
    gc.collect()
    assert failures(run_dir) == []
    return killed, code


@pytest.mark.slow
def test_a_process_killed_here_and_there_harms_nothing(tmp_path):
    killed, _ = sweep(tmp_path, (14, 33))
    assert killed == 2


@pytest.mark.slow
def test_a_process_killed_at_every_point_of_a_round_harms_nothing(tmp_path):
    killed, code = sweep(tmp_path, range(1, 1000))
    assert killed >= 40 and code == 0  # the last one had nothing left to be killed at


# A full disk.


def full_disk(tmp_path, points, length):
    """Runs a round for each point at which the disk is full for that many changes."""
    seen = 0
    for point in points:
        run_dir = tmp_path / f"{point}-{length}"
        first_version(run_dir)
        Stream(run_dir, "drifting").go_on(8, shift=0.5)
        count = [0]

        def strike(handle, data, count=count, point=point):
            count[0] += 1
            if point <= count[0] < point + length:
                raise FULL

        calibrator = small(run_dir)
        loop, lines = looking(calibrator, Schedule(rounds=1, on_drift=True), monitor=QUICK)
        loop._schedule = replace(loop._schedule, most_failures=None)
        with warnings.catch_warnings(), Changes(run_dir, strike):
            warnings.simplefilter("ignore")
            assert loop.run() == 1
        sound = Sound(run_dir)
        sound.check()
        assert len(calibrator.reports()) == 1, lines
        seen = count[0]
        if count[0] < point:
            return seen
    return seen


def test_a_disk_that_is_full_for_a_moment_costs_no_more_than_the_moment(tmp_path):
    assert full_disk(tmp_path, (12,), 8) > 20


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_point_harms_nothing(tmp_path):
    assert full_disk(tmp_path, range(1, 1000), 1) < 1000
    assert full_disk(tmp_path, range(1, 1000, 5), 6) < 1000


# A live state that is half written.


def half(path):
    """Cuts every file of a state to half of its bytes."""
    for file in path.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def test_a_live_state_that_is_half_written_is_passed_over_or_waited_out(tmp_path):
    trainer, watcher = small(tmp_path), small(tmp_path)
    trainer.follow(10, trainer.proxy.params, trainer.proxy.opt_state)
    watcher.observe()
    (session,) = (tmp_path / "live").iterdir()
    # Orbax writes under a name like this until a state is whole.
    shutil.copytree(session / "10", session / "20.orbax-checkpoint-tmp-7")
    half(session / "20.orbax-checkpoint-tmp-7")
    loop, lines = looking(watcher, Schedule(rounds=1))
    assert loop.run() == 1
    assert watcher.reports()[-1]["live_step"] == 10
    # A disk that lost power leaves a state that looks whole.
    shutil.copytree(session / "10", session / "30")
    half(session / "30")
    loop, lines = looking(watcher, Schedule(rounds=1))
    loop._schedule = replace(loop._schedule, most_failures=None)
    thread = in_thread(loop)
    until(lambda: failures(tmp_path) or len(watcher.reports()) == 2)
    if failures(tmp_path):
        assert "CalibrationFailed" in {f["error"] for f in failures(tmp_path)}, lines
        trainer.follow(40, trainer.proxy.params, trainer.proxy.opt_state)
    until(lambda: not thread.is_alive())
    assert watcher.reports()[-1]["live_step"] in (10, 40)
    Sound(tmp_path).check()


TRAINER = """
import os, signal, sys, threading
from test_watch_mode import small
from test_worker_faults import Changes

trainer = small(sys.argv[1])
trainer.follow(1, trainer.proxy.params, trainer.proxy.opt_state)
print("written", flush=True)
count, nth = [0], int(sys.argv[2])

def strike(handle, data):
    count[0] += 1
    if count[0] == nth:
        os.kill(os.getpid(), signal.SIGKILL)

with Changes(sys.argv[1], strike):
    trainer.follow(2, trainer.proxy.params, trainer.proxy.opt_state)
"""


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2, 4, 8])
def test_training_killed_while_it_hands_a_state_over_leaves_one_to_start_from(tmp_path, nth):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    found = subprocess.run(
        [sys.executable, "-c", TRAINER, str(tmp_path), str(nth)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "written" in found.stdout and found.returncode in (0, -signal.SIGKILL), found.stderr
    watcher = small(tmp_path)
    watcher.observe()
    loop, lines = looking(watcher, Schedule(rounds=1))
    assert loop.run() == 1, lines
    assert watcher.reports()[-1]["live_step"] in (1, 2)


# Two at once.


@pytest.mark.slow
def test_of_two_processes_one_works_and_the_other_takes_over_when_it_is_killed(tmp_path):
    run_dir = tmp_path / "run"
    first_version(run_dir)
    settings_text(tmp_path)
    schedule = "[schedule]\nrounds = 2\n"
    with start(tmp_path, "gate", schedule) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with start(tmp_path, "none", schedule) as second:
            first.communicate(timeout=300)
            output, _ = second.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL and second.returncode == 0
    assert "is being calibrated by process" in output and "done after 2 rounds" in output
    sound = Sound(run_dir)
    sound.check()
    reports = small(run_dir).reports()
    assert len(reports) == 2 and [r["round"] for r in reports] == [2, 3]


# Clocks.


def test_no_clock_that_can_jump_decides_anything():
    """`time.time` stamps lines for people in one place; everything else goes by monotonic time."""
    found = []
    for path in sorted((TESTS.parent / "metagrad_filter" / "calibration").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {
                "time.time",
                "time.time_ns",
                "datetime.now",
                "datetime.datetime.now",
            }:
                found.append(path.name)
    assert found == ["attend.py"]


def jumping(real):
    shifts = itertools.cycle([86400.0, -86400.0, 2.0**31])
    return lambda: real() + next(shifts)


def test_clocks_that_jump_change_neither_alarms_nor_requests_nor_rounds(tmp_path, monkeypatch):
    outcomes = []
    for jumps in (False, True):
        run_dir = tmp_path / str(jumps)
        publish(run_dir)
        with monkeypatch.context() as patch:
            if jumps:
                patch.setattr(time, "time", jumping(time.time))
            Stream(run_dir).go_on(12).go_on(6, shift=0.5)
            calibrator = small(run_dir)
            loop, _ = looking(calibrator, Schedule(rounds=1, on_drift=True), monitor=QUICK)
            assert loop.run() == 1
        alarms, damaged = read_alarms(open_store(run_dir))
        assert damaged == 0
        told = [(a["kind"], a["state"], a["block"], a["version"]) for a in alarms]
        outcomes.append((told, mgf.Registry(run_dir).versions(), len(failures(run_dir))))
    assert outcomes[0] == outcomes[1] and outcomes[0][0]


# A spool that grows too fast.


def test_a_spool_that_grows_too_fast_stays_within_its_limit_and_rounds_go_on(tmp_path):
    limit = 60_000
    windows = stream()
    spool = Spool(tmp_path, share=1.0, limit_bytes=limit, file_bytes=6_000)
    stop, largest = threading.Event(), [0]

    def flood():
        block = 0
        while not stop.is_set():
            spool.offer(block, np.random.default_rng(block).permutation(windows))
            spool.flush()
            held = 0
            for path in (tmp_path / "spool" / "default").iterdir():
                try:
                    held += path.stat().st_size
                except FileNotFoundError:
                    continue
            largest[0] = max(largest[0], held)
            block += 1

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    try:
        config = replace(SMALL, spooled_windows=100)
        calibrator = small(tmp_path, windows=SpooledWindows(tmp_path), config=config, proxy=proxy())
        loop, lines = looking(calibrator, Schedule(rounds=2))
        assert loop.run() == 2, lines
    finally:
        stop.set()
        thread.join()
    assert spool.counters.removed_files > 0 and spool.counters.failures == 0
    assert largest[0] <= limit + 10_000  # one file more while another is written
    assert len(calibrator.source) * windows[0].nbytes <= limit
    Sound(tmp_path).check()

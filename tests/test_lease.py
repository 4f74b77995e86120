"""One calibrator per run directory, with real processes that are killed, stopped and late."""

import contextlib
import json
import multiprocessing as mp
import os
import signal
import threading
import time

import pytest

from metagrad_filter.calibration import lease as module
from metagrad_filter.calibration.lease import Lease
from metagrad_filter.errors import ConfigError

PERIOD = 0.8


def hold(run_dir, locks, pipe):
    """A process that takes the lease, says so, and holds it until it is told otherwise."""
    if not locks:
        module.fcntl = None
    lease = Lease(run_dir, PERIOD)
    pipe.send(lease.acquire(None))
    pipe.recv()
    lease.release()
    pipe.send("released")
    pipe.recv()


def send(process, number):
    os.kill(process.pid, number)


@contextlib.contextmanager
def holder(run_dir, locks=True):
    # Not a fork of this process, which may hold JAX's threads.
    context = mp.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(run_dir, locks, there), daemon=True)
    process.start()
    assert here.recv() is True
    try:
        yield process, here
    finally:
        process.kill()
        process.join()


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(module, "fcntl", None)
    return request.param


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path, locks):
    with holder(tmp_path, locks) as (process, _):
        lease = Lease(tmp_path, PERIOD)
        assert not lease.acquire(0) and not lease.held
        message = f"calibrated by process {process.pid} on .*waits"
        with pytest.raises(ConfigError, match=message), lease.holding(timeout=0):
            pass
        # However long it waits: the holder lives.
        assert not lease.acquire(2.5 * PERIOD)


def test_the_holders_death_passes_the_lease_on_within_two_periods(tmp_path, locks):
    lease = Lease(tmp_path, PERIOD)
    with holder(tmp_path, locks) as (process, _):
        assert not lease.acquire(PERIOD / 2)
        send(process, signal.SIGKILL)
        process.join()
        assert lease.acquire(2 * PERIOD)
    assert lease.held
    lease.release()
    assert not lease.held


def test_a_release_passes_the_lease_on_at_once(tmp_path, locks):
    with holder(tmp_path, locks) as (_, pipe):
        pipe.send("release")
        assert pipe.recv() == "released"
        lease = Lease(tmp_path, PERIOD)
        assert lease.acquire(0)
        lease.release()


def test_a_holder_on_another_machine_is_judged_by_its_heartbeat(tmp_path, monkeypatch):
    # Locks that do not reach across: here it is free, as the holder's is its own machine's.
    with holder(tmp_path, locks=False) as (process, _):
        monkeypatch.setattr(module, "_machine", lambda: "another machine")
        lease = Lease(tmp_path, PERIOD)
        assert not lease.acquire(2 * PERIOD)
        send(process, signal.SIGKILL)
        assert lease.acquire(2 * PERIOD)
        lease.release()


def test_clocks_that_jump_change_nothing(tmp_path, locks, monkeypatch):
    shift = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    with holder(tmp_path, locks) as (process, _):
        lease = Lease(tmp_path, PERIOD)
        for jump in (86400.0, -86400.0, 2**31):
            shift[0] = jump
            path = tmp_path / "lease" / "holder.json"
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (real() + jump, real() + jump))
            assert not lease.acquire(PERIOD / 2)
        send(process, signal.SIGKILL)
        process.join()
        assert lease.acquire(2 * PERIOD)
        lease.release()


def test_a_holder_that_was_away_too_long_learns_that_it_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    with holder(tmp_path, locks=False) as (process, pipe):
        send(process, signal.SIGSTOP)
        lease = Lease(tmp_path, PERIOD)
        assert lease.acquire(3 * PERIOD)
        send(process, signal.SIGCONT)
        time.sleep(PERIOD)
        assert lease.held
        pipe.send("release")
        assert pipe.recv() == "released"
        # Its release left the new holder's claim alone.
        time.sleep(PERIOD / 2)
        found = json.loads((tmp_path / "lease" / "holder.json").read_bytes())
        assert lease.held and found["pid"] == os.getpid()
    lease.release()


def test_a_stopped_holder_keeps_its_lease_where_locks_say_that_it_lives(tmp_path):
    with holder(tmp_path) as (process, _):
        send(process, signal.SIGSTOP)
        assert not Lease(tmp_path, PERIOD).acquire(2.5 * PERIOD)
        send(process, signal.SIGCONT)


def test_of_many_that_wait_one_takes_over(tmp_path, locks):
    leases = [Lease(tmp_path, PERIOD) for _ in range(6)]
    with holder(tmp_path, locks) as (process, _):
        threads = [threading.Thread(target=lease.acquire, args=(2.2 * PERIOD,)) for lease in leases]
        for thread in threads:
            thread.start()
        send(process, signal.SIGKILL)
        process.join()
        for thread in threads:
            thread.join()
    time.sleep(PERIOD / 2)  # a beat
    assert [lease.held for lease in leases].count(True) == 1
    for lease in leases:
        lease.release()


def test_a_damaged_heartbeat_ages_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "holder.json").write_bytes(b'{"token": ')
    lease = Lease(tmp_path, PERIOD)
    assert not lease.acquire(PERIOD)
    assert lease.acquire(PERIOD)
    lease.release()


def test_nothing_but_the_lock_file_is_left_behind(tmp_path, locks):
    with Lease(tmp_path, PERIOD).holding() as lease:
        assert lease.held and lease.acquire(0)
    assert {path.name for path in (tmp_path / "lease").iterdir()} <= {".lock"}
    with lease.holding():  # and it can be taken again
        assert lease.held


def test_waiting_can_be_ended(tmp_path):
    with Lease(tmp_path, PERIOD).holding():
        assert not Lease(tmp_path, PERIOD).acquire(None, stopped=lambda: True)


@pytest.mark.parametrize("period", [0, -1, float("nan"), float("inf"), True])
def test_a_period_out_of_its_domain_is_refused(tmp_path, period):
    with pytest.raises(ConfigError, match="expected a positive number of seconds"):
        Lease(tmp_path, period)

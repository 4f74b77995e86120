"""Calibration in a process of its own that is not training's child: `calibrate --watch`.

    watch(Settings.load("calibrate.toml"))

The loop takes the lease, waits until a round is due, runs it and reports. Due are the first round,
requests under `run_dir/requests` (the drift monitor leaves some, `request_round` writes one), and
what the schedule says. A request is removed once a round that began after it has reported, so a
process that is killed serves it after its restart. What a killed round left behind is whole, and
its number is not used again where it left a trace.

A round that fails is recorded as `run_dir/rounds/failed-%06d.json`; the next try is 2, 4, 8 ...
seconds later, at most ten minutes. SIGTERM and SIGINT end the loop at the round's next sign of
progress; a second one ends the process at once. Waiting goes by the monotonic clock only.

Importing this imports no jax, so that limits can be applied first.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagrad_filter.calibration.lease import Lease
from metagrad_filter.calibration.settings import Schedule, Settings
from metagrad_filter.files import canonical_json, make_directory, read_bounded, write_once
from metagrad_filter.types import Progress, silent

if TYPE_CHECKING:
    from metagrad_filter.calibration.calibrator import Calibrator
    from metagrad_filter.calibration.round import RoundReport

REQUESTS = "requests"

_MOST_SECONDS = 600.0
_LIMIT = 65536
_FAILED = ("non-finite", "diverged")


class _Stopped(Exception):
    """Raised inside a round when the loop is to end."""


def watch(
    settings: Settings,
    *,
    once: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> int:
    """Calibrates beside training until the schedule's rounds are done or a signal comes.

    Args:
      settings: what to calibrate, and when.
      once: run one round now and return; refuse where another process holds the lease.
      say: called with one line at each change.
      progress: called with stage name, done and total.

    Returns:
      How many rounds reported.

    Raises:
      ConfigError: `setup` or the limits cannot be used, or, with `once`, the lease is taken.
      MetagradFilterError: with `once`, what the round raised.
    """
    settings.worker.apply()
    calibrator = settings.calibrator()
    calibrator.observe()
    calibrator.progress = progress
    if once:
        say(_told(calibrator.round()))
        return 1
    return Watch(calibrator, settings.schedule, say=say).run()


def request_round(run_dir: str | Path, reason: str, **details: Any) -> Path:
    """Asks the calibrator of a run directory for a round; returns the request's file.

    Args:
      run_dir: the run directory.
      reason: one sentence.
      details: JSON types.

    Raises:
      OSError: it cannot be written.
    """
    folder = Path(run_dir) / REQUESTS
    make_directory(folder)
    path = folder / f"{secrets.token_hex(8)}.json"
    write_once(path, canonical_json({**details, "reason": reason}))
    return path


class Watch:
    """The loop of `watch`, over a calibrator that is there already.

    Args:
      calibrator: runs the rounds.
      schedule: when.
      lease: of the same run directory; None makes one.
      say: called with one line at each change.
      look_seconds: between two looks at requests, live states and the spool.
      least_seconds: the unit of the back-off.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        schedule: Schedule,
        *,
        lease: Lease | None = None,
        say: Callable[[str], None] = lambda line: None,
        look_seconds: float = 1.0,
        least_seconds: float = 1.0,
    ):
        self._calibrator, self._schedule = calibrator, schedule
        self._lease = lease or Lease(calibrator.run_dir)
        self._say, self._said = say, ""
        self._look, self._least = look_seconds, least_seconds
        self._reports = calibrator.run_dir / "rounds"
        self._requests = calibrator.run_dir / REQUESTS
        self._stop = threading.Event()
        self._failures = 0
        self._progress = calibrator.progress
        last = (calibrator.reports() or [None])[-1]
        # After a restart the pause begins anew, for no clock says how long the process was away.
        self._first = last is None
        self._last_end = time.monotonic()
        self._last_step = None if last is None else last["live_step"]

    def stop(self) -> None:
        """Ends the loop soon; from any thread or signal handler."""
        self._stop.set()

    def run(self) -> int:
        """Runs until the schedule's rounds are done or `stop`; returns how many reported."""
        finished = 0
        self._calibrator.progress = self._stoppable
        try:
            with _signals(self.stop):
                while not self._stop.is_set() and finished != self._schedule.rounds:
                    finished += self._turn()
        except _Stopped:
            pass
        finally:
            self._calibrator.progress = self._progress
            self._lease.release()
        self._tell("stopped" if self._stop.is_set() else f"done after {finished} rounds")
        return finished

    def due(self) -> str:
        """Why a round is due now, or "" where none is."""
        schedule = self._schedule
        if time.monotonic() - self._last_end < schedule.pause_seconds and not self._first:
            return ""
        if self._first:
            return "the first round"
        asked = self._asked()
        if asked:
            return f"asked for: {_reason(asked[0])}"
        if schedule.every_steps is not None:
            step, last = self._calibrator.live_step(), self._last_step
            if step is None:
                return ""
            # A job that was set back stands elsewhere too.
            if last is None or abs(step - last) >= schedule.every_steps:
                return f"training is at step {step}"
            return ""
        return "" if schedule.on_drift else "the schedule"

    def _turn(self) -> int:
        """Waits a little or runs a round; returns 1 for one that reported."""
        try:
            return self._step()
        except _Stopped:
            raise
        except Exception as error:  # a user's model may raise anything; training goes on meanwhile
            self._failed(error)
            return 0

    def _step(self) -> int:
        if not self._lease.held:
            self._lease.release()
            if not self._lease.acquire(0):
                self._tell(self._lease.refusal())
                self._lease.acquire(self._look, stopped=self._stop.is_set)
                return 0
            self._tell("holding the lease")
        why = self.due()
        if not why:
            self._stop.wait(self._look)
            return 0
        asked = self._asked()
        if self._calibrator.missing_windows():
            self._tell("waiting for the filter to spool more windows")
            self._stop.wait(self._look)
            return 0
        self._tell(f"a round begins: {why}")
        report = self._calibrator.round(self._lease)
        self._tell(_told(report))
        self._first, self._last_end = False, time.monotonic()
        self._last_step = report.live_step
        for path in asked:
            with contextlib.suppress(OSError):  # what stays is served once more
                path.unlink()
        if report.reason.startswith(_FAILED):
            self._back_off(report.reason)
        else:
            self._failures = 0
        return 1

    def _failed(self, error: Exception) -> None:
        """Records what a round raised, and waits."""
        record = {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "failures_in_a_row": self._failures + 1,
        }
        try:
            taken = [int(path.stem[7:]) for path in self._reports.glob("failed-*.json")]
            number = max(taken, default=0) + 1
            while not write_once(
                self._reports / f"failed-{number:06d}.json", canonical_json(record)
            ):
                number += 1
        except OSError as unwritable:
            warnings.warn(
                f"A failed round cannot be recorded in {self._reports}: {unwritable}; the failure "
                f"was {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._back_off(f"{type(error).__name__}: {error}")

    def _back_off(self, why: str) -> None:
        self._failures += 1
        seconds = min(_MOST_SECONDS, self._least * 2.0 ** min(self._failures, 64))
        self._tell(f"the round failed, the next one is tried in {seconds:.0f} s: {why}")
        self._stop.wait(seconds)

    def _asked(self) -> list[Path]:
        return sorted(self._requests.glob("*.json"))

    def _stoppable(self, stage: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._progress(stage, done, total)

    def _tell(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self._say(line)


def _told(report: RoundReport) -> str:
    if report.version is None:
        return f"round {report.round} published nothing: {report.reason}"
    assert report.strength is not None
    strength = "inf" if math.isinf(report.strength) else f"{report.strength:g}"
    return f"round {report.round} published version {report.version} of strength {strength}"


def _reason(path: Path) -> str:
    """The reason of a request; one that cannot be read is a request all the same."""
    try:
        return str(json.loads(read_bounded(path, _LIMIT))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.name


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` at the first SIGTERM or SIGINT; what a second one does is the default."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        stop()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

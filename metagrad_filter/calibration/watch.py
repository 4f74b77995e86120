"""The loop of a calibrating process: attend to the run, wait until a round is due, run it, report.

    watch(Settings.load("calibrate.toml"))                 # `metagrad-filter calibrate --watch`
    Watch(calibrator, schedule, monitor=Monitoring()).run()       # in `Calibrator.background()` too

The loop takes the lease and then looks about once a second, during rounds as well: at what the
filters record (`attend.py`), and whether live validation broke its trend (`retreat.py`). Rounds
are due at first, when somebody asked (`requests.py`; a standing alarm does, with `on_drift`), and
when the schedule says so. A request is removed once a round that began after it has reported, so a
process that is killed serves it after its restart. What a killed round left behind is whole, and
its number is not used again where it left a trace.

A round that fails is recorded as `run_dir/rounds/failed-%06d.json`; the next try is 2, 4, 8 ...
seconds later, at most ten minutes. Trouble with attending is told, waited for alike, and keeps no
round from being run. SIGTERM and SIGINT end the loop at the round's next sign of progress; a second
one ends the process at once. Waiting goes by the monotonic clock only.

Importing this imports no jax, so that limits can be applied first.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from metagrad_filter.calibration.attend import Attendant
from metagrad_filter.calibration.lease import Lease
from metagrad_filter.calibration.monitoring import Monitoring
from metagrad_filter.calibration.requests import reason_of, request_round, waiting_requests
from metagrad_filter.calibration.retreat import Retreat
from metagrad_filter.calibration.settings import Schedule, Settings
from metagrad_filter.errors import ConfigError
from metagrad_filter.files import canonical_json, write_once
from metagrad_filter.types import Progress, silent

if TYPE_CHECKING:
    from metagrad_filter.calibration.calibrator import Calibrator
    from metagrad_filter.calibration.round import RoundReport

__all__ = ["Watch", "request_round", "watch"]

_MOST_SECONDS = 600.0
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
      ConfigError: `setup`, the limits or a sink cannot be used, or, with `once`, the lease is
        taken.
      MetagradFilterError: with `once`, what the round raised.
    """
    settings.monitor.require_packages()
    settings.worker.apply()
    calibrator = settings.calibrator()
    calibrator.observe()
    calibrator.progress = progress
    if once:
        say(_told(calibrator.round()))
        return 1
    return Watch(calibrator, settings.schedule, monitor=settings.monitor, say=say).run()


class _Superseded(Exception):
    """Raised inside a round that began before live validation broke its trend."""


class Watch:
    """The loop, over a calibrator that is there already.

    Args:
      calibrator: runs the rounds.
      schedule: when.
      monitor: how drift is watched.
      lease: of the same run directory; None makes one.
      say: called with one line at each change.
      look_seconds: between two looks at records, requests, live states and the spool.
      least_seconds: the unit of the back-off.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        schedule: Schedule,
        *,
        monitor: Monitoring | None = None,
        lease: Lease | None = None,
        say: Callable[[str], None] = lambda line: None,
        look_seconds: float = 1.0,
        least_seconds: float = 1.0,
    ):
        self._calibrator, self._schedule = calibrator, schedule
        self._monitor = monitor or Monitoring()
        self._lease = lease or Lease(calibrator.run_dir)
        self._say, self._said = say, ""
        self._look, self._least = look_seconds, least_seconds
        self._run_dir = calibrator.run_dir
        self._stop = threading.Event()
        self._failures, self._raised, self._not_before = 0, 0, 0.0
        self._attendant: Attendant | None = None
        self._retreat = Retreat(self._run_dir, calibrator.registry)
        # By what is attended to: not before when, and how often it failed in a row.
        self._attended = {"validation": (0.0, 0), "drift": (0.0, 0)}
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
        """Runs until the schedule's rounds are done or `stop`; returns how many reported.

        Raises:
          Exception: what a round raised, where it is the schedule's `most_failures` in a row.
        """
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
            self._leave()
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
        asked = waiting_requests(self._run_dir)
        if asked:
            return f"asked for: {reason_of(asked[0])}"
        if schedule.every_steps is not None:
            step, last = self._calibrator.live_step(), self._last_step
            if step is None:
                return ""
            # A job that was set back stands elsewhere too.
            if last is None or abs(step - last) >= schedule.every_steps:
                return f"training is at step {step}"
            return ""
        return "" if schedule.on_drift else "the schedule"

    def attend(self) -> None:
        """Looks after the run, at most once a look; raises nothing, for rounds go on."""
        if self._lease.held:
            # First what cannot wait: this may set the filter to uniform.
            self._attend_to("validation", self._retreat.look)
            self._attend_to("drift", lambda: self._attending().look())

    def _attend_to(self, what: str, look: Callable[[], list[str]]) -> None:
        after, failures = self._attended[what]
        if time.monotonic() < after:
            return
        try:
            for line in look():
                self._say(line)
            seconds, failures = self._look, 0
        except Exception as error:
            if what == "drift" and not isinstance(error, OSError):
                self._leave()  # it is made anew, from what is stored
            failures += 1
            seconds = self._delay(failures)
            told = f"{type(error).__name__}: {error}"
            self._say(f"attending to {what} failed, the next try is in {seconds:.2g} s: {told}")
        self._attended[what] = time.monotonic() + seconds, failures

    def _attending(self) -> Attendant:
        if self._attendant is None:
            try:
                sinks = self._monitor.sinks()
            except ConfigError as error:
                warnings.warn(
                    f"The monitor's numbers go to run_dir/monitor only: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )
                sinks = []
            ask = self._schedule.on_drift
            self._attendant = Attendant(self._run_dir, self._monitor, ask=ask, sinks=sinks)
        return self._attendant

    def _leave(self) -> None:
        """Ends attending: the lease is another's, or its state is not to be trusted."""
        attendant, self._attendant = self._attendant, None
        if attendant is not None:
            attendant.close()

    def _turn(self) -> int:
        """Waits a little or runs a round; returns 1 for one that reported."""
        try:
            return self._step()
        except _Stopped:
            raise
        except Exception as error:  # a user's model may raise anything; training goes on meanwhile
            self._failed(error)
            self._raised += 1
            if self._raised == self._schedule.most_failures:
                raise
            return 0

    def _step(self) -> int:
        if not self._lease.held:
            self._leave()
            self._lease.release()
            if not self._lease.acquire(0):
                self._tell(self._lease.refusal())
                self._lease.acquire(self._look, stopped=self._stop.is_set)
                return 0
            self._tell("holding the lease")
        self.attend()
        why = self.due() if time.monotonic() >= self._not_before else ""
        if not why:
            self._stop.wait(self._look)
            return 0
        asked = waiting_requests(self._run_dir)
        if self._calibrator.missing_windows():
            self._tell("waiting for the filter to spool more windows")
            self._stop.wait(self._look)
            return 0
        self._tell(f"a round begins: {why}")
        try:
            report = self._calibrator.round(self._lease)
        except _Superseded:
            self._tell("the round is given up: it began before live validation broke its trend")
            return 0
        self._tell(_told(report))
        self._first, self._last_end = False, time.monotonic()
        self._last_step = report.live_step
        for path in asked:
            with contextlib.suppress(OSError):  # what stays is served once more
                path.unlink()
        self._raised = 0
        if report.reason.startswith(_FAILED):
            self._back_off(report.reason)
        else:
            self._failures = 0
        self._attended["drift"] = 0.0, self._attended["drift"][1]
        self._attend_to("drift", lambda: self._attending().round_ended(report.to_json()))
        return 1

    def _failed(self, error: Exception) -> None:
        """Records what a round raised, and puts the next one off."""
        record = {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "failures_in_a_row": self._failures + 1,
        }
        folder = self._run_dir / "rounds"
        try:
            taken = [int(path.stem[7:]) for path in folder.glob("failed-*.json")]
            number = max(taken, default=0) + 1
            while not write_once(folder / f"failed-{number:06d}.json", canonical_json(record)):
                number += 1
        except OSError as unwritable:
            warnings.warn(
                f"A failed round cannot be recorded in {folder}: {unwritable}; the failure "
                f"was {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._back_off(f"{type(error).__name__}: {error}")

    def _back_off(self, why: str) -> None:
        self._failures += 1
        seconds = self._delay(self._failures)
        self._not_before = time.monotonic() + seconds
        self._tell(f"the round failed, the next one is tried in {seconds:.2g} s: {why}")

    def _delay(self, times: int) -> float:
        return min(_MOST_SECONDS, self._least * 2.0 ** min(times, 64))

    def _stoppable(self, stage: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        before = self._retreat.count
        self.attend()
        if self._retreat.count != before:
            raise _Superseded
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

"""The background calibration worker: the loop of `watch.py` in a spawned process beside training.

Training never waits for it and never depends on it: the two meet in the run directory only. The
worker runs at low priority, ends itself when its parent is gone, and may be killed at any moment,
for everything it leaves behind is written whole or not at all. It holds the lease of the run
directory for as long as it lives.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagrad_filter.calibration.lease import Lease
from metagrad_filter.calibration.limits import Limits
from metagrad_filter.calibration.monitoring import Monitoring
from metagrad_filter.calibration.settings import Schedule
from metagrad_filter.calibration.watch import Watch
from metagrad_filter.errors import CalibrationFailed, ConfigError

if TYPE_CHECKING:
    from metagrad_filter.calibration.calibrator import Calibrator

_PARENT_SECONDS = 1.0  # between two looks at whether the parent lives
_STOP_SECONDS = 5.0  # for a round in progress to notice that it is abandoned
_LEAVE_SECONDS = 60.0  # for a worker without work to shut its interpreter down, on a busy machine
# What grain and prometheus_client go by when several processes write the same metrics.
_SHARED_METRICS = ("PROMETHEUS_MULTIPROC_DIR", "ENABLE_PYGRAIN_PROMETHEUS_TELEMETRY")


class BackgroundCalibration:
    """A worker process that runs calibration rounds.

    Attributes:
      process: the process; its death harms nothing but the freshness of the scorer.
      error_path: where the worker leaves a traceback if a round raises.
    """

    def __init__(self, process: Any, calibrator: Calibrator, error_path: Path):
        self.process = process
        self.error_path = error_path
        self._calibrator = calibrator
        self._before = len(calibrator.reports())

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def reports(self) -> list[dict[str, Any]]:
        """Reports of the rounds finished since this worker started, oldest first."""
        return self._calibrator.reports()[self._before :]

    def wait(self, rounds: int = 1, *, timeout_seconds: float = 3600.0) -> list[dict[str, Any]]:
        """Waits until that many rounds have finished. For tests and demonstrations: a training
        loop has no reason to wait.

        Raises:
          CalibrationFailed: the worker died or time ran out first; the message says which.
        """
        end = time.monotonic() + timeout_seconds
        while len(done := self.reports()) < rounds:
            if not self.alive and len(done := self.reports()) < rounds:
                detail = ""
                with suppress(FileNotFoundError):
                    detail = "; it left: " + self.error_path.read_text().strip()
                raise CalibrationFailed(
                    f"the calibration worker ended with exit code {self.process.exitcode} after "
                    f"{len(done)} of {rounds} rounds{detail}"
                )
            if time.monotonic() > end:
                raise CalibrationFailed(
                    f"{len(done)} of {rounds} rounds finished in {timeout_seconds:.0f} seconds; "
                    "wait longer or lower horizon, trajectories or labels."
                )
            time.sleep(0.1)
        return done


@contextmanager
def start_worker(
    calibrator: Calibrator,
    *,
    schedule: Schedule,
    monitor: Monitoring,
    limits: Limits,
    wait_seconds: float,
) -> Iterator[BackgroundCalibration]:
    """Spawns the worker; see `Calibrator.background`."""
    context = mp.get_context("spawn")
    # Pipes, for an Event that a killed process waited on blocks whoever sets it.
    stop, say_stop = context.Pipe(duplex=False)
    leaving, say_leaving = context.Pipe(duplex=False)
    error_path = calibrator.run_dir / "rounds" / "worker-error.txt"
    error_path.unlink(missing_ok=True)
    try:
        # Serialised here to turn a failure into advice before a process exists, and sent as bytes
        # so that limits are in place before the calibrator's arrays and JAX are.
        payload = bytes(ForkingPickler.dumps(calibrator))
    except Exception as error:
        raise ConfigError(
            f"the calibrator cannot be sent to another process: {error}; make loss and optimizer "
            "importable (a module-level function, DecoderLoss, functools.partial(optax.adamw)) "
            "and pass windows as an array or a .npy path."
        ) from error
    process = context.Process(
        target=_work,
        args=(payload, stop, say_leaving, error_path, os.getpid()),
        kwargs={
            "schedule": schedule,
            "monitor": monitor,
            "limits": limits,
            "wait_seconds": wait_seconds,
        },
        name="metagrad-calibration",
        daemon=True,
    )
    with _own_metrics():
        process.start()
    stop.close()
    say_leaving.close()
    try:
        yield BackgroundCalibration(process, calibrator, error_path)
    finally:
        if process.exitcode not in (None, 0):
            warnings.warn(
                f"the calibration worker ended early with exit code {process.exitcode}; the filter "
                f"went on with the versions that were published. A traceback, if it left one, is "
                f"in {error_path}.",
                RuntimeWarning,
                stacklevel=4,
            )
        # Said as well as closed, for processes that were forked meanwhile hold the pipe open too.
        with suppress(OSError):
            say_stop.send_bytes(b"stop")
        say_stop.close()
        process.join(_STOP_SECONDS)
        # Said, or closed by the end of the process.
        if leaving.poll():
            process.join(_LEAVE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        leaving.close()


@contextmanager
def _own_metrics() -> Iterator[None]:
    """Keeps a process that starts meanwhile out of the metric files that this one's workers share.

    What the worker exports has a port of its own; in those files it would be counted twice.
    """
    taken = {name: os.environ.pop(name) for name in _SHARED_METRICS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _work(
    payload: bytes,
    stop,
    leaving,
    error_path: Path,
    parent: int,
    *,
    schedule: Schedule,
    monitor: Monitoring,
    limits: Limits,
    wait_seconds: float,
) -> None:
    # Never read, so that it stays readable; it also is when the parent has closed its side or died.
    def ended(seconds: float = 0.0) -> bool:
        return stop.poll(seconds) or os.getppid() != parent

    try:
        limits.apply()
        calibrator: Calibrator = ForkingPickler.loads(payload)  # pyright: ignore
        lease = Lease(calibrator.run_dir)
        if not lease.acquire(wait_seconds, stopped=ended):
            if ended():
                return
            raise ConfigError(lease.refusal())
        loop = Watch(calibrator, schedule, monitor=monitor, lease=lease)

        def follow_the_parent() -> None:
            while not ended(_PARENT_SECONDS):
                pass
            loop.stop()

        threading.Thread(target=follow_the_parent, name="metagrad-parent", daemon=True).start()
        loop.run()
    except Exception:
        error_path.write_text(traceback.format_exc())
        raise
    finally:
        # A parent that is gone does not hear it.
        with suppress(OSError):
            leaving.send_bytes(b"leaving")

"""The calibrator: rounds in this process, or beside training in a process of its own."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from numpy.typing import ArrayLike

from metagrad_filter.calibration.checkpoint import Checkpoints
from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.lease import Lease
from metagrad_filter.calibration.limits import Limits
from metagrad_filter.calibration.live import latest_live, save_live
from metagrad_filter.calibration.monitoring import Monitoring
from metagrad_filter.calibration.round import (
    RoundReport,
    check_source,
    run_round,
    window_check,
)
from metagrad_filter.calibration.settings import Schedule
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.calibration.validation import record_validation
from metagrad_filter.calibration.validity import Kind, ValidityCheck, check_validity
from metagrad_filter.calibration.worker import BackgroundCalibration, start_worker
from metagrad_filter.errors import CalibrationFailed, ConfigError, WindowError
from metagrad_filter.files import canonical_json, write_once
from metagrad_filter.labels import LabelStore
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.registry import Registry
from metagrad_filter.targets import Target
from metagrad_filter.types import Progress, PyTree, silent
from metagrad_filter.windows import SeriesWindows, TextWindows


class Calibrator:
    """Learns scorers from metagradients and publishes them in a run directory.

    Args:
      run_dir: the directory that `score_filter` reads; created if missing.
      proxy: the model in training.
      target: what the filter should improve.
      windows: raw windows, see `WindowSource`: an `(N, T)` array, a .npy path, or a dataset with
        random access together with `elements`, or `SpooledWindows` of a filter that samples its
        stream.
      config: how rounds are run.
      elements: how an element of a dataset becomes an array.
      checkpoints: the folder that the training job writes its Orbax checkpoints to, or
        `Checkpoints` to say where parameters and optimizer state lie in them. Each round starts
        from the newest complete one; the job needs no change.
      progress: called with stage name, done and total.
      sources: where each of the windows is from, `(N,)` names, or the entry of a dataset's elements
        that holds the name. Then a candidate that would all but drop a large source is rejected,
        see `gate_minimum_source_share` and `gate_may_starve`.
      metadata: JSON types that every published version carries, such as
        `{"scaling": scaling.as_dict()}` of the time series adapter.

    Example:
      >>> calibrator = Calibrator(run_dir, proxy=proxy, target=HeldOutLoss(held_out),
      ...                         windows=windows)                           # doctest: +SKIP
      >>> report = calibrator.round()                                       # doctest: +SKIP
      >>> with calibrator.background():                                     # doctest: +SKIP
      ...     train()
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        proxy: Proxy,
        target: Target,
        windows: Any,
        config: CalibrationConfig | None = None,
        elements: TextWindows | SeriesWindows | None = None,
        checkpoints: str | Path | Checkpoints | None = None,
        progress: Progress | None = None,
        sources: Any = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.run_dir = Path(run_dir).absolute()
        self._session: str | None = secrets.token_hex(8)
        self.config = config or CalibrationConfig()
        self.proxy = proxy
        self.target = target
        if not isinstance(checkpoints, Checkpoints | None):
            checkpoints = Checkpoints(str(checkpoints))
        self.checkpoints = checkpoints
        self.progress = progress or silent
        check = window_check(proxy, target, self.config)
        self.source = WindowSource(windows, elements, check, sources)
        for part in target.held_out:
            check(part.target_windows)
            check(part.gate_windows)
        if self.source.spool is None:
            check_source(self.source, self.config)
        self.registry = Registry(self.run_dir, metadata)
        self.labels = LabelStore(self.run_dir)
        self._reports = self.run_dir / "rounds"
        self._reports.mkdir(parents=True, exist_ok=True)

    def follow(self, step: int, params: PyTree, opt_state: PyTree = None) -> None:
        """Hands over the training state of a step; later rounds start from the newest one.

        Returns when the state is complete under `run_dir/live`: training waits as long as it takes
        to write one checkpoint, and for nothing else. Without `opt_state` rounds warm moments
        themselves. A job that writes Orbax checkpoints anyway names their folder as `checkpoints`
        instead.

        Raises:
          ConfigError: this calibrator reads checkpoints.
        """
        if self.checkpoints is not None:
            raise ConfigError(
                f"this calibrator reads checkpoints from {self.checkpoints.directory}; either "
                "hand states over with follow() or name a folder, not both."
            )
        if self._session is None:
            raise ConfigError(
                "this calibrator observes the states of another process; call follow() of the "
                "Calibrator in the training job."
            )
        save_live(self.run_dir, self._session, step, params, opt_state)

    def validation(self, step: int, loss: float, *, reset: bool = False) -> None:
        """Records a live validation loss, see `record_validation`: call it after each evaluation.

        A worker beside training watches the curve and, where it breaks its trend, publishes the
        running version with strength 0 until a gate accepts another.

        Raises:
          ConfigError: `step` or `loss` is not a number of that kind.
          OSError: it cannot be written.
        """
        record_validation(self.run_dir, step, loss, reset=reset)

    def observe(self) -> None:
        """From now on, rounds start from states that another process hands over with `follow`."""
        self._session = None

    def configure(self, **changes: Any) -> None:
        """Replaces fields of `config`; raises `ConfigError`, and leaves it as it was then."""
        config = replace(self.config, **changes)
        self.source.check_with(window_check(self.proxy, self.target, config))
        self.config = config

    def missing_windows(self) -> int:
        """How many more windows the spool needs before a round can begin; 0 for other sources.

        Looks for new ones, so windows change their positions: not while a round is running.
        """
        if self.source.spool is None:
            return 0
        config = self.config
        wanted = config.spooled_windows or max(100, config.trajectory_windows)
        return max(0, wanted - self.source.refresh())

    def round(self, lease: Lease | None = None) -> RoundReport:
        """Runs one round in this process: labels, fit, gate, publish (or the reason why not).

        Args:
          lease: one of this run directory that the caller holds over several rounds; None takes it
            for this round.

        Raises:
          ConfigError: another process calibrates this run directory.
          WindowError: the spool holds too few windows yet; nothing was begun.
          CalibrationFailed: the live state cannot be read, or the lease was lost on the way.
        """
        with nullcontext(lease) if lease else Lease(self.run_dir).holding() as lease:
            missing = self.missing_windows()
            if self.source.spool is not None and missing:
                raise WindowError(
                    f"{self.source.spool.describe()} holds {len(self.source)} windows, "
                    f"{missing} fewer than a round begins with; let the filter run on, or lower "
                    "spooled_windows."
                )
            if self.source.spool is not None:
                check_source(self.source, self.config)
            return self._round(lease)

    def _round(self, lease: Lease) -> RoundReport:
        def progress(stage: str, done: int, total: int) -> None:
            if not lease.held:
                raise CalibrationFailed(
                    f"another process took {self.run_dir} over while this one did not answer; the "
                    "round ends here, and the other one goes on."
                )
            self.progress(stage, done, total)

        proxy, step, started_from = self._start()
        report = run_round(
            proxy,
            self.target,
            self.source,
            self.config,
            number=self._next_number(),
            registry=self.registry,
            store=self.labels,
            live_step=step,
            started_from=started_from,
            run_dir=self.run_dir,
            progress=progress,
        )
        path = self._reports / f"round-{report.round:06d}.json"
        write_once(path, canonical_json(report.to_json()))
        return report

    def check(
        self, kind: Kind = "tilt", *, classes: ArrayLike | None = None, **options: Any
    ) -> ValidityCheck:
        """Asks training itself whether the labels are right, which reliability cannot say.

        Labels a pool as a round would, from where a round would start, and retrains on tilted
        mixtures ("tilt") or on random halves of it ("lds"). Nothing is published; what was found
        is stored as `rounds/check-*.json` of the run directory. It costs as much as some
        trajectories; see `calibration/validity.py`.

        Args:
          kind: "tilt" or "lds".
          classes: `(len(source),)` class of each window of the source; None makes clusters.
          options: `clusters`, `pool_windows`, `steps`, `seeds`, `subsets` and `seed` of
            `check_validity`.

        Raises:
          ConfigError: an argument is out of its domain.
          CalibrationFailed: the live state cannot be read.
          NonFiniteMetagradient, TrajectoryDiverged: the measurement left the finite numbers.
        """
        if self.source.spool is not None:
            self.source.refresh()
        check_source(self.source, self.config)
        proxy, step, _ = self._start()
        found = check_validity(
            proxy,
            self.target,
            self.source,
            self.config,
            kind=kind,
            classes=classes,
            live_step=step,
            progress=self.progress,
            **options,
        )
        taken = [int(path.stem[6:]) for path in self._reports.glob("check-*.json")]
        number = max(taken, default=0) + 1
        data = canonical_json(found.to_json())
        while not write_once(self._reports / f"check-{number:06d}.json", data):
            number += 1
        return found

    def _start(self) -> tuple[Proxy, int | None, str]:
        """The proxy where training stands now, the step it has reached, and whence it is known."""
        proxy = self.proxy
        optimizer = proxy.transformation(proxy.learning_rate)
        if self.checkpoints is not None:
            place = self.checkpoints.directory
            live = self.checkpoints.newest(proxy.params, optimizer)
            if live is None:
                return proxy, None, f"the proxy as given: no complete checkpoint yet in {place}"
            started_from = f"a checkpoint in {place}"
        else:
            session = self._live_session()
            if session is None:
                return proxy, None, "the proxy as given"
            live = latest_live(self.run_dir, session, proxy.params, optimizer)
            if live is None:
                return proxy, None, "the proxy as given"
            started_from = "the state handed over by follow()"
        return proxy.at(live.params, live.opt_state), live.step, started_from

    def live_step(self) -> int | None:
        """The newest step of the training job that a round could start from, or None."""
        session = self._live_session()
        if self.checkpoints is not None:
            place = epath.Path(self.checkpoints.directory)
        elif session is not None:
            place = epath.Path(self.run_dir) / "live" / session
        else:
            return None
        try:
            names = [path.name for path in ocp.utils.checkpoint_steps_paths(place)]
            return max(map(ocp.utils.step_from_checkpoint_name, names), default=None)
        except (FileNotFoundError, ValueError):  # none yet, or the folder is one checkpoint
            return None

    def _live_session(self) -> str | None:
        """Whose live states are read: this object's, or those of whoever hands some over."""
        if self._session is not None:
            return self._session
        # A job that starts anew removes the states of the one before it.
        found = list((self.run_dir / "live").glob("*"))
        return max(found, key=_changed).name if found else None

    @contextmanager
    def background(
        self,
        *,
        rounds: int | None = None,
        pause_seconds: float = 0.0,
        limits: Limits | None = None,
        wait_seconds: float = 60.0,
        schedule: Schedule | None = None,
        monitor: Monitoring | None = None,
    ) -> Iterator[BackgroundCalibration]:
        """Runs rounds in a process of its own until the block ends.

        The process starts each round from the newest state that `follow` has stored, or from the
        newest of the `checkpoints`. Whatever becomes of it, the loader goes on with the versions
        that are published. At the end of the block a round in progress is abandoned. A script that
        uses this needs the usual `if __name__ == "__main__":` guard of Python's spawned processes.
        The process runs the loop of `metagrad-filter calibrate --watch`, with which it shares the
        run directory's requests and the drift monitor.

        Args:
          rounds: how many to run, None for as many as time allows.
          pause_seconds: pause between rounds.
          limits: niceness, threads and device of the process; by default niceness 10.
          wait_seconds: for a calibrator that holds this run directory, such as the worker of a job
            that was killed just before; then the worker ends with a `ConfigError`.
          schedule: when rounds are run, instead of `rounds` and `pause_seconds`; for instance
            `Schedule(every_steps=2000, on_drift=True)`. Without one, the worker ends with the first
            exception of a round; with one, it goes on as `most_failures` says.
          monitor: how drift is watched, and where its numbers go; None for the defaults.

        Yields:
          `BackgroundCalibration`, to look at or to wait for.

        Raises:
          ConfigError: the proxy or the windows cannot be sent to another process, a schedule is
            given twice, or a package that `monitor` needs is missing.
        """
        if schedule is None:
            schedule = Schedule(rounds, pause_seconds, most_failures=1)
        elif rounds is not None or pause_seconds:
            raise ConfigError(
                f"rounds={rounds!r} and pause_seconds={pause_seconds!r} are given beside a "
                "schedule; set them in the schedule."
            )
        monitor = monitor or Monitoring()
        monitor.require_packages()
        with start_worker(
            self,
            schedule=schedule,
            monitor=monitor,
            limits=limits or Limits(),
            wait_seconds=wait_seconds,
        ) as worker:
            yield worker

    def reports(self) -> list[dict[str, Any]]:
        """Reports of the finished rounds in this run directory, oldest first, as JSON."""
        return [
            json.loads(path.read_bytes()) for path in sorted(self._reports.glob("round-*.json"))
        ]

    def _next_number(self) -> int:
        """One more than any that left a trace, also where its process died before the report."""
        reported = [int(path.stem[6:]) for path in self._reports.glob("round-*.json")]
        rejected = sorted((self.run_dir / "registry").glob("rejected-*.json"))
        records = [json.loads(path.read_bytes())["metadata"] for path in rejected]
        traces = [record["round"] for record in records if "round" in record]
        return max([*reported, *self.labels.rounds(), *traces], default=0) + 1

    def __getstate__(self) -> dict[str, Any]:
        """For the worker process: arrays on the host, no callback into this process."""
        proxy = self.proxy.at(
            jax.tree.map(np.asarray, self.proxy.params),
            jax.tree.map(np.asarray, self.proxy.opt_state),
        )
        return {**self.__dict__, "proxy": proxy, "progress": silent}


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # removed since it was listed
        return 0

"""Settings of the drift monitor that the calibrating process runs: the table `[monitor]`.

    Monitoring(prometheus_port=9432).sinks(run_dir)      Monitoring(min_windows=2048).monitor(...)

Thresholds have defaults that hold without tuning; where numbers go besides `run_dir/monitor` is
nowhere unless it is named here. Importing this imports no jax and no sink's package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metagrad_filter.errors import ConfigError
from metagrad_filter.monitor.alarms import TRIGGERS, Alarm, Monitor
from metagrad_filter.monitor.sinks import MetricSink, Prometheus, TensorBoard, WeightsAndBiases

KINDS = (*TRIGGERS, "keep_ratio", "age")

_LEAST_REFERENCE = 128  # windows; the least that `Monitor` knows limits for


@dataclass(frozen=True)
class Monitoring:
    """What the drift monitor watches, how easily it is alarmed, and where its numbers go.

    Attributes:
      prometheus_port: to answer `/metrics` on; None for none, 0 for any free one.
      prometheus_address: to listen on; the default is reachable from this machine alone.
      tensorboard: folder for event files, or None; needs metagrad-filter[tensorboard].
      wandb_project: Weights & Biases project, or None; needs metagrad-filter[wandb].
      target_keep_ratio: what is asked of every filter; None takes it from each filter's own record.
      level, windows_per_sample, min_windows, run_length, keep_tolerance, max_age_blocks,
        min_agreement, triggers: as for `monitor.alarms.Monitor`.
      alarm_needed, alarm_among, alarm_clear_after: as for `monitor.alarms.Alarm`.
      again_blocks: blocks after which an alarm that still stands asks for a round again, because
        the round that it asked for published nothing; twice as many each further time.

    Raises:
      ConfigError: a field is out of its domain.
    """

    prometheus_port: int | None = None
    prometheus_address: str = "127.0.0.1"
    tensorboard: str | None = None
    wandb_project: str | None = None
    target_keep_ratio: float | None = None
    level: float = 1e-4
    windows_per_sample: float = 1.0
    min_windows: int = 512
    run_length: float = 1e5
    keep_tolerance: float = 0.01
    max_age_blocks: int | None = None
    min_agreement: float = 0.1
    alarm_needed: int = 2
    alarm_among: int = 3
    alarm_clear_after: int = 3
    triggers: tuple[str, ...] = TRIGGERS
    again_blocks: int = 256

    def __post_init__(self):
        port = self.prometheus_port
        if port is not None and (type(port) is not int or not 0 <= port <= 65535):
            raise ConfigError(f"prometheus_port={port!r}; expected a port from 0 to 65535 or None.")
        for name in ("prometheus_address", "tensorboard", "wandb_project"):
            value = getattr(self, name)
            optional = name != "prometheus_address"
            if not (value is None and optional) and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name}={value!r}; expected a text that is not empty.")
        if type(self.again_blocks) is not int or self.again_blocks < 1:
            raise ConfigError(f"again_blocks={self.again_blocks!r}; expected an integer >= 1.")
        for kind in self.triggers:
            if kind not in KINDS and not (isinstance(kind, str) and kind.startswith("feature:")):
                raise ConfigError(
                    f"triggers holds {kind!r}; expected some of {list(KINDS)} or 'feature:<name>'."
                )
        self.monitor()

    def monitor(
        self,
        reference: Callable[[int], Sequence[float] | None] | None = None,
        *,
        target_keep_ratio: float | None = None,
        reference_windows: float | None = None,
    ) -> Monitor:
        """Makes the monitor of one filter.

        Args:
          reference: as for `Monitor`.
          target_keep_ratio: the filter's own, where these settings name none.
          reference_windows: behind the reference of the version that is followed; None for the
            default of `Monitor`.
        """
        known = (
            {}
            if reference_windows is None
            else {"reference_windows": max(int(reference_windows), _LEAST_REFERENCE)}
        )
        return Monitor(
            reference,
            target_keep_ratio=self.target_keep_ratio or target_keep_ratio,
            level=self.level,
            windows_per_sample=self.windows_per_sample,
            min_windows=self.min_windows,
            run_length=self.run_length,
            keep_tolerance=self.keep_tolerance,
            max_age_blocks=self.max_age_blocks,
            min_agreement=self.min_agreement,
            alarm=Alarm(self.alarm_needed, self.alarm_among, self.alarm_clear_after),
            triggers=self.triggers,
            **known,
        )

    def require_packages(self) -> None:
        """Looks for the packages of the sinks that are named, without importing them.

        Raises:
          ConfigError: one is not installed; the message says how to install it.
        """
        for name, value, package, extra in (
            ("tensorboard", self.tensorboard, "tensorboardX", "metagrad-filter[tensorboard]"),
            ("wandb_project", self.wandb_project, "wandb", "metagrad-filter[wandb]"),
        ):
            if value is not None and importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"{name}={value!r} needs the package {package}, which is not installed; pip "
                    f"install '{extra}' or leave {name} out."
                )

    def sinks(self) -> list[MetricSink]:
        """Opens the sinks that are named; the caller closes them.

        Raises:
          ConfigError: a package is missing, or the port cannot be used.
        """
        self.require_packages()
        found: list[MetricSink] = []
        try:
            if self.prometheus_port is not None:
                # A registry of its own: a process may run several calibrators.
                from prometheus_client import CollectorRegistry

                prometheus = Prometheus(CollectorRegistry())
                prometheus.serve(self.prometheus_port, self.prometheus_address)
                found.append(prometheus)
            if self.tensorboard is not None:
                found.append(TensorBoard(self.tensorboard))
            if self.wandb_project is not None:
                found.append(WeightsAndBiases(project=self.wandb_project))
        except BaseException:
            for sink in found:
                sink.close()
            raise
        return found

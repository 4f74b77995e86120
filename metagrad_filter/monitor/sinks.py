"""Where the filter's numbers go: JSON Lines, Prometheus, TensorBoard, Weights & Biases.

    sink = Prometheus(); sink.serve(9432)
    for record in records: sink.write(record["last_block"], values_of(record, monitor.current))

Every sink has `write(step, values, labels)` and `close()`. Names are those of `METRICS`; names that
end in `_total` are what was added since the last write, all others are present values. A package is
imported when its sink is made, and a missing one is named together with how to install it. Cost: a
few microseconds a value; `Prometheus.observe_scores` takes about one microsecond a window.

A loader's worker processes count through `export_block`: where an exporter of several processes
runs, such as grain's own under ENABLE_PYGRAIN_PROMETHEUS_TELEMETRY=true, their numbers are on its
port, added up, and no server of ours is needed. Importing this imports none of the packages.

Read next: `alarms.py` (what is worth exporting), `exporter.py` (a run's numbers from its files).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from metagrad_filter.blockstats import BINS, OTHER
from metagrad_filter.errors import ConfigError
from metagrad_filter.files import make_directory
from metagrad_filter.monitor.port import MetricsPort

if TYPE_CHECKING:
    from metagrad_filter.monitor.alarms import Finding

PREFIX = "metagrad_filter_"

# Name without prefix -> (what it is, label names). `_total` are counters, the others gauges.
METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "windows_total": ("Windows by what became of them.", ("decision", "source")),
    "tokens_total": ("Tokens by what became of their window.", ("decision", "source")),
    "keep_ratio": ("Share of the windows that is kept.", ()),
    "target_keep_ratio": ("Share of the windows that shall be kept.", ()),
    "threshold": ("Lowest kept score of a block, on average.", ()),
    "debt_windows": ("Windows that the threshold rule owes its ratio.", ()),
    "clamped_batches_total": ("Batches in which the ratio's band decided.", ()),
    "scorer_version": ("Version of the scorer that acts; 0 keeps uniformly.", ()),
    "scorer_age_seconds": ("Seconds since the acting version was published.", ()),
    "scorer_age_blocks": ("Blocks since the acting version began to act.", ()),
    "score_duration_seconds_total": ("Seconds inside the scorer.", ()),
    "score_mean": ("Mean score.", ()),
    "score_psi": ("Population stability index of the scores against their reference, nats.", ()),
    "score_ks": ("Binned Kolmogorov-Smirnov distance of the scores from their reference.", ()),
    "score_cusum": ("Cumulative sum of the mean score's shifts, in standard errors.", ()),
    "score_psi_limit": ("What score_psi exceeds by chance as rarely as the monitor allows.", ()),
    "score_ks_limit": ("What score_ks exceeds by chance as rarely as the monitor allows.", ()),
    "rank_correlation": ("Spearman's rho of the scorer with fresh labels.", ()),
    "alarm": ("1 while the alarm of this kind stands.", ("kind",)),
    "lost_records_total": ("Block statistics that could not be written.", ()),
    "publish_failures_total": ("Scorer versions that could not be published.", ()),
    "calibration_duration_seconds": ("Seconds of the last calibration round.", ()),
}

SCORE_BUCKETS = 16
SCORE_TEXT = "Level of the score in the version's reference sample, 0 to 1."

_LABEL_VALUES = 32
_LABEL_LENGTH = 64
_FINDINGS = {
    "psi": "score_psi",
    "ks": "score_ks",
    "mean": "score_cusum",
    "rank_agreement": "rank_correlation",
    "age": "scorer_age_blocks",
}


_exported: Prometheus | None = None
_export_lock = threading.Lock()


@runtime_checkable
class MetricSink(Protocol):
    """Takes numbers along the stream."""

    def write(
        self, step: int, values: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> None:
        """Writes values of one step.

        Args:
          step: block, >= 0.
          values: by name of `METRICS`, without prefix.
          labels: for instance `{"decision": "kept", "source": "web"}`.

        Raises:
          ConfigError: a name or label is unknown to the sink, or a value is no number.
        """
        ...

    def close(self) -> None:
        """Writes what is left and lets go of files and ports; a second call does nothing."""
        ...


def values_of(record: Mapping[str, Any], current: Mapping[str, Finding]) -> dict[str, float]:
    """Returns what a record and the monitor's newest looks say, for a sink.

    Args:
      record: of `read_records` or `merge`.
      current: `Monitor.current`.
    """
    values = {
        "scorer_version": float(max(record["version"], 0)),
        "score_duration_seconds_total": float(record["seconds"]),
    }
    if record["windows"]:
        values["keep_ratio"] = record["kept"] / record["windows"]
    if record["threshold"] is not None:
        values["threshold"] = record["threshold"]["mean"]
    if record["scores"] is not None:
        values["score_mean"] = record["scores"]["mean"]
    for kind, name in _FINDINGS.items():
        if kind in current:
            values[name] = current[kind].value
            if f"{name}_limit" in METRICS:
                values[f"{name}_limit"] = current[kind].limit
    return values


def exported() -> Prometheus | None:
    """Returns the process's sink where an exporter of several processes runs, else None.

    Such a one is told by PROMETHEUS_MULTIPROC_DIR, which grain sets when it is imported under
    ENABLE_PYGRAIN_PROMETHEUS_TELEMETRY=true. The sink is made once a process.
    """
    global _exported
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return None
    with _export_lock:
        if _exported is None:
            _exported = Prometheus()
        return _exported


def export_block(
    sink: MetricSink,
    *,
    block: int,
    version: int,
    kept: Sequence[int],
    windows: int,
    sources: Sequence[Any] | None = None,
    tokens: int = 0,
    threshold: float | None = None,
    target: float | None = None,
    seconds: float = 0.0,
) -> None:
    """Counts one block of a filter.

    Args:
      sink: of `exported`.
      block: the block's index.
      version: the scorer's; 0 or less is a uniform choice.
      kept: positions of the windows that are kept.
      windows: in the block.
      sources: the source of each of them; None counts them under the source "".
      tokens: in one window; 0 where that is not known, which leaves tokens uncounted.
      threshold: lowest kept score.
      target: share of the windows that shall be kept.
      seconds: time inside the scorer.
    """
    labels = [""] * windows if sources is None else list(map(str, sources))
    seen, chosen = Counter(labels), Counter(labels[i] for i in kept)
    for source, count in seen.items():
        for decision, of in (("kept", chosen[source]), ("dropped", count - chosen[source])):
            values = {"windows_total": float(of)}
            if tokens:
                values["tokens_total"] = float(of * tokens)
            sink.write(block, values, {"decision": decision, "source": source})
    values = {
        "keep_ratio": len(kept) / windows if windows else None,
        "target_keep_ratio": target,
        "threshold": threshold,
        "scorer_version": float(max(version, 0)),
        "score_duration_seconds_total": seconds,
    }
    sink.write(block, {name: value for name, value in values.items() if value is not None})


class JsonLines:
    """One JSON object a line: `{"step": .., "labels": {..}, "values": {..}}`.

    Args:
      path: file to append to; its directory is made.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            make_directory(self.path.parent.absolute())
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._handle: int | None = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"path is {str(self.path)!r}, which cannot be written ({error}); name a file in a "
                "directory that this process can write."
            ) from error

    def write(
        self, step: int, values: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> None:
        if self._handle is None:
            raise ConfigError(f"{self.path} is closed; make another JsonLines to go on.")
        # JSON has no NaN; null says that there is no value.
        numbers = {
            name: value if math.isfinite(value) else None
            for name, value in _checked(step, values).items()
        }
        record = {"step": step, "labels": dict(labels or {}), "values": numbers}
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        os.write(self._handle, line)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Prometheus:
    """Counters and gauges named `metagrad_filter_*` in a prometheus_client registry.

    Works in prometheus_client's multiprocess mode (`PROMETHEUS_MULTIPROC_DIR` set before its first
    import): counters add up over processes, a gauge shows the value written last. Of the values of
    the label `source`, the first 32 are told apart and the rest are "other".

    Args:
      registry: a prometheus_client registry; None for the process's own.

    Raises:
      ConfigError: prometheus_client is not installed, or the registry has these metrics already.
    """

    def __init__(self, registry: Any = None):
        self._client = _package("prometheus_client", "prometheus-client")
        self._registry = self._client.REGISTRY if registry is None else registry
        self._metrics: dict[str, Any] = {}
        self._sources: set[str] = set()
        self._port = MetricsPort()
        try:
            for name, (text, labels) in METRICS.items():
                if name.endswith("_total"):
                    metric = self._client.Counter(
                        PREFIX + name, text, labels, registry=self._registry
                    )
                else:
                    metric = self._client.Gauge(
                        PREFIX + name,
                        text,
                        labels,
                        registry=self._registry,
                        multiprocess_mode="mostrecent",
                    )
                self._metrics[name] = metric
            levels = [level / SCORE_BUCKETS for level in range(1, SCORE_BUCKETS)]
            self._score = self._client.Histogram(
                PREFIX + "score",
                SCORE_TEXT,
                registry=self._registry,
                buckets=levels,
            )
        except ValueError as error:
            for metric in self._metrics.values():
                self._registry.unregister(metric)
            raise ConfigError(
                f"the registry refuses the filter's metrics ({error}); use one Prometheus sink a "
                "process, or give each a registry of its own."
            ) from error

    def write(
        self, step: int, values: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> None:
        labels = labels or {}
        numbers = _checked(step, values)
        for name, value in numbers.items():
            if name not in METRICS:
                raise ConfigError(f"value {name!r} is unknown, expected one of {sorted(METRICS)}.")
            if set(labels) != set(METRICS[name][1]):
                raise ConfigError(
                    f"labels of {name} are {sorted(labels)}, expected {sorted(METRICS[name][1])}; "
                    "write values with other labels in a call of their own."
                )
            if name.endswith("_total") and not 0 <= value < math.inf:
                raise ConfigError(
                    f"{name} is {value!r}, expected what was added since the last write, >= 0."
                )
        labels = {key: self._bounded(key, value) for key, value in labels.items()}
        for name, value in numbers.items():
            metric = self._metrics[name].labels(**labels) if labels else self._metrics[name]
            if name.endswith("_total"):
                metric.inc(value)
            else:
                metric.set(value)

    def observe_scores(self, bins: Sequence[int]) -> None:
        """Adds the windows of a record's `bins` to the histogram `metagrad_filter_score`.

        Raises:
          ConfigError: they are not 64 counts >= 0.
        """
        if len(bins) != BINS or not all(isinstance(c, int) and c >= 0 for c in bins):
            raise ConfigError(f"bins is {bins!r}, expected {BINS} counts >= 0.")
        for position, count in enumerate(bins):
            level = (position + 0.5) / BINS
            for _ in range(count):
                self._score.observe(level)

    def serve(self, port: int, addr: str = "127.0.0.1") -> int:
        """Answers `/metrics` over HTTP in a thread until `close`.

        Args:
          port: 1 to 65535; 0 for any free one.
          addr: address to listen on; the default is reachable from this machine alone.

        Returns:
          The port.

        Raises:
          ConfigError: the sink serves already, or the port cannot be used.
        """
        registry = self._registry
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            # The processes' files are read at every request; this process's values are in them.
            multiprocess = importlib.import_module("prometheus_client.multiprocess")
            registry = self._client.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return self._port.open(registry, port, addr)

    @property
    def port(self) -> int | None:
        """The port that `serve` opened, or None."""
        return self._port.number

    def close(self) -> None:
        self._port.close()

    def _bounded(self, key: str, value: str) -> str:
        value = str(value)[:_LABEL_LENGTH]
        if key != "source" or value == OTHER or value in self._sources:
            return value
        if len(self._sources) >= _LABEL_VALUES:
            return OTHER
        self._sources.add(value)
        return value


class TensorBoard:
    """Scalars `filter/<name>` in an event file.

    Args:
      directory: where TensorBoard looks.

    Raises:
      ConfigError: tensorboardX is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        package = _package("tensorboardX", "metagrad-filter[tensorboard]")
        self._writer = package.SummaryWriter(os.fspath(directory))

    def write(
        self, step: int, values: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> None:
        if self._writer is None:
            raise ConfigError("the event file is closed; make another TensorBoard to go on.")
        for name, value in _checked(step, values).items():
            self._writer.add_scalar(_tag(name, labels), value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """Values `filter/<name>` of a Weights & Biases run, by block.

    Args:
      run: a run that is open, left open by `close`; None begins one, with `options`.
      **options: of `wandb.init`, such as `project` or `mode="offline"`.

    Raises:
      ConfigError: wandb is not installed.
    """

    def __init__(self, run: Any = None, **options: Any):
        self._owned = run is None
        if run is None:
            run = _package("wandb", "metagrad-filter[wandb]").init(**options)
        self._run = run

    def write(
        self, step: int, values: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> None:
        if self._run is None:
            raise ConfigError("the run is closed; make another WeightsAndBiases to go on.")
        numbers = {_tag(name, labels): v for name, v in _checked(step, values).items()}
        # The run's own step counts optimizer steps; blocks are an axis of their own.
        self._run.log({"filter/block": step, **numbers})

    def close(self) -> None:
        if self._run is not None and self._owned:
            self._run.finish()
        self._run = None


def _tag(name: str, labels: Mapping[str, str] | None) -> str:
    parts = [str(labels[key])[:_LABEL_LENGTH] for key in sorted(labels)] if labels else []
    return "/".join(["filter", name, *parts])


def _checked(step: int, values: Mapping[str, float]) -> dict[str, float]:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ConfigError(f"step is {step!r}, expected a block, an int >= 0.")
    numbers = {}
    for name, value in values.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"value {name!r} is {value!r}, expected a number.") from None
    return numbers


def _package(name: str, requirement: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this sink needs the package {name}, which is not installed; pip install "
            f"'{requirement}'."
        ) from error

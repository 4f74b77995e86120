"""A run's numbers for Prometheus, read from what the run stores: no filter needs to be asked.

    with RunExporter(run_dir) as exporter:
        port = exporter.serve(9432)                  # 127.0.0.1:9432/metrics

Every scrape reads the view that the page shows, at most once in ten seconds, so figures here and
there are the same. Names are those of `sinks.METRICS`, and they are of the filter that has seen
most windows, or of the one that is named. What nothing stores (tokens, debts, lost records) is left
out. Counters never fall, also where old records are no longer read.

Cost: that of one view a scrape. Read next: `sinks.py` (the names, and other ways to the same
dashboard), `view.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from metagrad_filter.monitor.port import MetricsPort
from metagrad_filter.monitor.records import BINS, number
from metagrad_filter.monitor.sinks import METRICS, PREFIX, SCORE_BUCKETS, SCORE_TEXT
from metagrad_filter.monitor.view import run_view
from metagrad_filter.store import Store, open_store

_FRESH_SECONDS = 10.0
_NEWEST = {
    "keep_ratio": "kept_ratio",
    "threshold": "threshold_mean",
    "score_mean": "score_mean",
    "score_psi": "psi",
    "score_psi_limit": "psi_limit",
    "score_ks": "ks",
    "score_ks_limit": "ks_limit",
}

Value = tuple[dict[str, str], float]


class RunExporter:
    """Answers Prometheus for one run; a context manager that closes its port.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      name: the filter's; None for the one that has seen most windows.
      fresh_seconds: how long a view is good for.

    Raises:
      ConfigError: `run_dir` is not one.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | Store,
        name: str | None = None,
        *,
        fresh_seconds: float = _FRESH_SECONDS,
    ):
        self._store, self._name, self._fresh = open_store(run_dir), name, fresh_seconds
        self._lock = threading.Lock()
        self._values: dict[str, list[Value]] = {}
        self._bins: list[int] = []
        self._again = 0.0
        self._highest: dict[tuple[str, str], float] = {}
        self._port = MetricsPort()
        self.registry = CollectorRegistry()
        self.registry.register(self)  # pyright: ignore[reportArgumentType]

    def __enter__(self) -> RunExporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def describe(self) -> list[Metric]:
        """Names nothing, so that registering reads no run."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields what is known of the run now."""
        with self._lock:
            if time.monotonic() >= self._again:
                began = time.monotonic()
                self._read(run_view(self._store, verify=False))
                ended = time.monotonic()
                self._again = ended + max(self._fresh, 4 * (ended - began))
            values, bins = dict(self._values), list(self._bins)
        for name, found in values.items():
            text, labels = METRICS[name]
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(PREFIX + name, text, labels=labels)
            for labelled, value in found:
                family.add_metric([labelled[key] for key in labels], value)
            yield family
        if bins:
            yield _histogram(bins)

    def text(self) -> bytes:
        """Returns the answer to a scrape, in Prometheus' text format."""
        return generate_latest(self.registry)

    def serve(self, port: int, addr: str = "127.0.0.1") -> int:
        """Answers `/metrics` over HTTP in a thread until `close`; returns the port.

        Args:
          port: 0 for any free one.
          addr: address to listen on; the default is reachable from this machine alone.

        Raises:
          ConfigError: the port cannot be used.
        """
        return self._port.open(self.registry, port, addr)

    def close(self) -> None:
        """Lets go of the port; a second call does nothing."""
        self._port.close()

    def _read(self, view: Mapping[str, Any]) -> None:
        filters = view["filters"]
        name = self._name
        if name is None:
            name = max(sorted(filters), key=lambda n: filters[n]["windows"], default=None)
        found = {} if name not in filters else _of_filter(filters[name])
        found |= _of_run(view)
        for metric, values in found.items():
            if metric.endswith("_total"):
                found[metric] = [(labels, self._risen(metric, labels, v)) for labels, v in values]
        self._values = {metric: values for metric, values in found.items() if values}
        self._bins = (filters[name]["score_bins"] or []) if name in filters else []

    def _risen(self, metric: str, labels: Mapping[str, str], value: float) -> float:
        key = metric, repr(sorted(labels.items()))
        self._highest[key] = max(value, self._highest.get(key, 0.0))
        return self._highest[key]


def _of_filter(seen: Mapping[str, Any]) -> dict[str, list[Value]]:
    plain: dict[str, Any] = {
        "target_keep_ratio": seen["target_ratio"],
        "scorer_version": None if seen["version"] is None else max(seen["version"], 0),
        "scorer_age_seconds": seen["age_seconds"],
        "scorer_age_blocks": seen["age_blocks"],
        "score_duration_seconds_total": seen["seconds"],
    }
    for metric, column in _NEWEST.items():
        values = [v for v in seen["series"].get(column, ()) if v is not None]
        plain[metric] = values[-1] if values else None
    found = {metric: _one(value) for metric, value in plain.items()}
    # Windows without a source count too; where sources are known, they add up to all.
    groups = seen["groups"].get("source") or [
        {"label": "", "seen": seen["windows"], "kept": seen["kept"]}
    ]
    found["windows_total"] = [
        ({"decision": decision, "source": group["label"]}, float(count))
        for group in groups
        for decision, count in (
            ("kept", group["kept"]),
            ("dropped", group["seen"] - group["kept"]),
        )
    ]
    standing = {alarm["kind"] for alarm in seen["alarms"]["standing"]}
    kinds = {alarm["kind"] for alarm in seen["alarms"]["events"]} | standing
    found["alarm"] = [({"kind": kind}, float(kind in standing)) for kind in sorted(kinds)]
    return found


def _of_run(view: Mapping[str, Any]) -> dict[str, list[Value]]:
    found: dict[str, list[Value]] = {}
    rounds = view["rounds"]
    agreed = [r["agreement"]["rho"] for r in rounds if r["agreement"]]
    fitted = [r["rank_correlation"] for r in rounds]
    known = [value for value in (agreed or fitted) if number(value) is not None]
    found["rank_correlation"] = _one(known[-1] if known else None)
    if rounds and isinstance(rounds[-1]["seconds"], dict):
        parts = [number(value) for value in rounds[-1]["seconds"].values()]
        found["calibration_duration_seconds"] = _one(sum(v for v in parts if v is not None))
    found["publish_failures_total"] = _one(view["publish_failures"])
    return found


def _one(value: Any) -> list[Value]:
    known = number(value)
    return [] if known is None else [({}, known)]


def _histogram(bins: list[int]) -> Metric:
    per = BINS // SCORE_BUCKETS
    total, buckets = 0, []
    for bucket in range(SCORE_BUCKETS):
        total += sum(bins[bucket * per : (bucket + 1) * per])
        last = bucket == SCORE_BUCKETS - 1
        buckets.append(("+Inf" if last else str((bucket + 1) / SCORE_BUCKETS), float(total)))
    levels = sum((i + 0.5) / BINS * count for i, count in enumerate(bins))
    family = HistogramMetricFamily(PREFIX + "score", SCORE_TEXT)
    family.add_metric([], buckets, levels)
    return family

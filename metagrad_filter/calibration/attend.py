"""Follows what the filters of a run record: says what has drifted, and asks for a round.

    attendant = Attendant(run_dir, Monitoring(), ask=True)
    attendant.look() -> ["train: psi 0.31 above 0.02 at block 812, version 3"]      # every second

Each filter of the run has a `Monitor`, which decides what is an alarm; this feeds it, writes down
what it raised or cleared, hands numbers to sinks, and asks for a round while an alarm stands that a
round answers. One alarm asks once. It asks again only where the round that answered published
nothing, and the stream has moved on by `again_blocks` since, then by twice as many, and so on.
A version that has a successor already is not complained of.

Written under `run_dir/monitor`:
  `alarms.jsonl`: a line of JSON a change, appended: `format` (1), `filter`, `kind`, `state`
    ("raised" or "cleared"), `block`, `value`, `limit`, `version`, and `time` for people to read.
  `state.json`: what a restarted process goes on from, replaced as a whole.
A process that is killed between the two writes no line twice: what the file ends with is known.

No clock decides anything here. Cost of a look without news: one listing a filter; with news, about
a millisecond a record, at most 4 MiB of records at once.

Read next: `monitor/alarms.py` (what an alarm is), `watch.py` (who looks).
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

from metagrad_filter.blockstats import merge
from metagrad_filter.calibration.metric_files import MetricTails
from metagrad_filter.calibration.monitoring import Monitoring
from metagrad_filter.calibration.requests import request_round, waiting_requests
from metagrad_filter.errors import MetagradFilterError, ScorerRejected
from metagrad_filter.files import canonical_json, make_directory, read_bounded, replace_file
from metagrad_filter.ledger import FOLDER as LEDGERS
from metagrad_filter.monitor.alarms import Finding, Monitor
from metagrad_filter.monitor.sinks import MetricSink, values_of
from metagrad_filter.monitor.sketch import references
from metagrad_filter.monitor.stream import reference_size
from metagrad_filter.registry import Registry

FOLDER = "monitor"
ALARMS = "alarms.jsonl"
STATE = "state.json"
FORMAT = 1

_STATE_BYTES = 64 * 2**20
_TAIL_BYTES = 2**20
_UNWRITTEN = 4096  # lines that wait for a full disk before the oldest are given up
_DOUBLINGS = 16

Record = dict[str, Any]


class Attendant:
    """Attends to all filters of a run directory; one at a time, the holder of the lease.

    Args:
      run_dir: the run directory.
      settings: of the monitors.
      ask: whether a standing alarm asks for a round.
      sinks: where numbers go; closed by `close`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        settings: Monitoring | None = None,
        *,
        ask: bool = False,
        sinks: Sequence[MetricSink] = (),
    ):
        self._run_dir = Path(run_dir)
        self._folder = self._run_dir / FOLDER
        self._settings, self._ask = settings or Monitoring(), ask
        self._sinks, self._failing = list(sinks), set[int]()
        self._registry = Registry(run_dir)
        self._reference = references(run_dir)
        self._tails = MetricTails(run_dir)
        self._monitors: dict[str, Monitor] = {}
        # By filter and kind, of alarms that stand: the block of the last request, and how many.
        self._asked: dict[str, dict[str, dict[str, int]]] = {}
        self._blocks: dict[str, int] = {}
        self._known: deque[tuple[Any, ...]] = deque(maxlen=_UNWRITTEN)
        self._unwritten: deque[bytes] = deque(maxlen=_UNWRITTEN)
        self._torn = False
        self._changed = False
        self._read_tail()
        self._restore()

    @property
    def monitors(self) -> Mapping[str, Monitor]:
        """By filter name, of the filters that have left records."""
        return self._monitors

    def look(self) -> list[str]:
        """Takes in what is new, writes down what changed, and asks for a round where one is due.

        Returns:
          A line for each alarm that was raised or cleared, and for each request.

        Raises:
          OSError: nothing can be written or read; what was taken in is kept for the next look.
        """
        said: list[str] = []
        for name in self._tails.names():
            records, all_read = self._tails.read(name)
            if records:
                self._changed = True
                said += self._take(name, records)
            if self._ask and all_read:
                said += self._ask_for_round(name)
        self._save()
        return said

    def agreement(self, found: Mapping[str, Any]) -> list[str]:
        """Takes in how a version agrees with fresh labels.

        Args:
          found: `rho`, `low`, `high` and `version`, as of `reference.Agreement.to_json`.

        Returns:
          A line for each alarm that was raised or cleared.
        """
        said: list[str] = []
        for name, monitor in self._monitors.items():
            if monitor.version != found["version"]:
                continue
            block = self._blocks[name]
            numbers = [float(found[field]) for field in ("rho", "low", "high")]
            for finding in monitor.agreement(block, *numbers):
                said.append(self._record(name, finding, monitor.version))
                if finding.state == "raised":
                    # A round has only just answered; the next one shall see something new.
                    asked = self._asked.setdefault(name, {})
                    asked.setdefault(finding.kind, {"block": block, "times": 1})
            self._changed = True
        self._save()
        return said

    def round_ended(self, report: Mapping[str, Any]) -> list[str]:
        """Takes in the report of a round, as JSON: its agreement, and its length for the sinks."""
        values = {"calibration_duration_seconds": float(sum(report["seconds"].values()))}
        self._write(max(self._blocks.values(), default=0), values)
        found = report.get("agreement")
        return self.agreement(found) if found else []

    def close(self) -> None:
        """Closes the sinks."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            self._guarded(sink, sink.close)

    def _take(self, name: str, records: list[Record]) -> list[str]:
        """Feeds a monitor version by version; returns what to say."""
        said: list[str] = []
        ordered = sorted(records, key=lambda r: (r["first_block"], r["session"], r["sequence"]))
        for version, group in groupby(ordered, key=lambda r: r["version"]):
            group = list(group)
            monitor = self._monitors.get(name)
            before = None if monitor is None else monitor.version
            if monitor is None or before is None or version > before:
                monitor = self._monitors[name] = self._monitor(name, version, monitor)
                # The first record of a new version clears the alarms of the one before it.
                for finding in monitor.feed(group[:1]):
                    old = before if finding.state == "cleared" else version
                    said.append(self._record(name, finding, old))
            for finding in monitor.feed(group):
                said.append(self._record(name, finding, monitor.version))
            block = max(r["last_block"] for r in group)
            self._blocks[name] = max(block, self._blocks.get(name, 0))
            self._show(group, monitor, block)
        standing = set(_standing(self._monitors[name]))
        asked = self._asked.get(name, {})
        self._asked[name] = {kind: last for kind, last in asked.items() if kind in standing}
        return said

    def _monitor(self, name: str, version: int, before: Monitor | None) -> Monitor:
        """The filter's monitor, with limits that fit the version's reference sample."""
        try:
            manifest = self._registry.manifest(version) if version > 0 else {}
            size = reference_size(manifest.get("metadata"))
        except ScorerRejected:
            size = None  # the monitor finds no reference either
        monitor = self._settings.monitor(
            self._reference, target_keep_ratio=self._target(name), reference_windows=size
        )
        if before is not None:
            monitor.restore(before.state())
        return monitor

    def _target(self, name: str) -> float | None:
        """The keep ratio that the filter has recorded, or None."""
        path = self._run_dir / LEDGERS / name / "filter.json"
        try:
            ratio = float(Fraction(json.loads(read_bounded(path, _TAIL_BYTES))["keep_ratio"]))
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError):
            return None
        return ratio if 0 < ratio <= 1 else None

    def _ask_for_round(self, name: str) -> list[str]:
        monitor, asked = self._monitors.get(name), self._asked.setdefault(name, {})
        if monitor is None or not monitor.wants_round:
            return []
        if monitor.version != self._newest(monitor.version):
            return []  # the filter has yet to take up the answer
        block = self._blocks[name]
        triggers = [kind for kind in _standing(monitor) if kind in self._settings.triggers]
        due = [kind for kind in triggers if self._is_due(asked.get(kind), block)]
        prefix = f"drift-{name}-"
        if not due or any(p.name.startswith(prefix) for p in waiting_requests(self._run_dir)):
            return []
        found = {kind: monitor.current[kind] for kind in due}
        told = ", ".join(f"{kind} {f.value:.3g} (limit {f.limit:.3g})" for kind, f in found.items())
        reason = f"drift of {name}: {told}"
        request_round(
            self._run_dir,
            reason,
            key=f"{prefix}{monitor.version}-{block}",
            version=monitor.version,
            block=block,
        )
        for kind in triggers:
            times = min(asked.get(kind, {"times": 0})["times"] + 1, _DOUBLINGS)
            asked[kind] = {"block": block, "times": times}
        self._changed = True
        return [f"asked for a round: {reason}"]

    def _newest(self, followed: int | None) -> int | None:
        """The version that filters will follow next: a damaged one is not what they wait for."""
        newest = self._registry.latest()
        return newest if newest == followed else self._registry.look().version

    def _is_due(self, last: Mapping[str, int] | None, block: int) -> bool:
        if last is None:
            return True
        return block - last["block"] >= self._settings.again_blocks * 2 ** (last["times"] - 1)

    def _record(self, name: str, finding: Finding, version: int | None) -> str:
        """Queues a line of `alarms.jsonl`, unless it is there; returns what to say."""
        key = (name, version, finding.kind, finding.state, finding.block)
        if key not in self._known:
            self._known.append(key)
            line = {
                "format": FORMAT,
                "filter": name,
                "kind": finding.kind,
                "state": finding.state,
                "block": finding.block,
                "value": finding.value,
                "limit": finding.limit,
                "version": version,
                "time": time.time(),
            }
            self._unwritten.append(canonical_json(line) + b"\n")
        where = f"at block {finding.block}, version {version}"
        if finding.state == "cleared":
            return f"{name}: {finding.kind} is quiet again {where}"
        return f"{name}: {finding.kind} {finding.value:.3g} (limit {finding.limit:.3g}) {where}"

    def _show(self, records: list[Record], monitor: Monitor, block: int) -> None:
        """Hands the numbers of some records of one version to the sinks."""
        if not self._sinks:
            return
        look = merge(records)
        values = values_of(look, monitor.current)
        target = self._settings.target_keep_ratio or self._target(look["name"])
        if target is not None:
            values["target_keep_ratio"] = target
        self._write(block, values)
        for labels, count in _by_source(look):
            self._write(block, {"windows_total": float(count)}, labels)
        for kind, finding in monitor.current.items():
            self._write(block, {"alarm": float(finding.state == "raised")}, {"kind": kind})

    def _write(
        self, step: int, values: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> None:
        for sink in self._sinks:
            self._guarded(sink, lambda sink=sink: sink.write(step, values, labels))

    def _guarded(self, sink: MetricSink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a sink is somebody's service, and no reason to stop rounds
            if id(sink) not in self._failing:
                self._failing.add(id(sink))
                warnings.warn(
                    f"{type(sink).__name__} does not take the monitor's numbers "
                    f"({type(error).__name__}: {error}); calibration goes on, and it is tried "
                    "again with the next ones.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _save(self) -> None:
        """Writes lines, then the state that they lead to; raises `OSError`."""
        if self._unwritten:
            make_directory(self._folder)
            path = self._folder / ALARMS
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            handle = os.open(path, flags, 0o600)
            try:
                while self._unwritten:
                    # After half a line, a line end keeps the next one whole.
                    data = b"\n" * self._torn + self._unwritten[0]
                    self._torn = True
                    if os.write(handle, data) < len(data):
                        raise OSError(f"half a line was written to {path}; is the disk full?")
                    self._torn = False
                    self._unwritten.popleft()
            finally:
                os.close(handle)
        if self._changed:
            state = {
                "format": FORMAT,
                "places": self._tails.state(),
                "monitors": {name: m.state() for name, m in self._monitors.items()},
                "asked": self._asked,
                "blocks": self._blocks,
            }
            replace_file(self._folder / STATE, canonical_json(state))
            self._changed = False

    def _restore(self) -> None:
        path = self._folder / STATE
        try:
            state = json.loads(read_bounded(path, _STATE_BYTES))
            if state["format"] != FORMAT:
                raise ValueError(f"its format is {state['format']!r}")
            monitors = {}
            for name, saved in state["monitors"].items():
                monitor = self._monitor(name, int(saved["version"] or 0), None)
                monitor.restore(saved)
                monitors[name] = monitor
            self._tails.restore(state["places"])
            self._asked = {
                name: {
                    k: {"block": int(v["block"]), "times": int(v["times"])} for k, v in a.items()
                }
                for name, a in state["asked"].items()
            }
            self._blocks = {name: int(block) for name, block in state["blocks"].items()}
            self._monitors = {name: m for name, m in monitors.items() if name in self._blocks}
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError, MetagradFilterError) as error:
            warnings.warn(
                f"The monitor's state in {path} cannot be read ({type(error).__name__}: {error}); "
                "it is made anew from the records that are there.",
                RuntimeWarning,
                stacklevel=3,
            )
            self._monitors, self._asked, self._blocks = {}, {}, {}
            self._tails = MetricTails(self._run_dir)

    def _read_tail(self) -> None:
        """Remembers the newest lines, so that none of them is written again."""
        try:
            with open(self._folder / ALARMS, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - _TAIL_BYTES, 0))
                data = file.read(_TAIL_BYTES)
        except FileNotFoundError:
            return
        self._torn = not data.endswith(b"\n")
        for line in data.split(b"\n"):
            try:
                found = json.loads(line)
                key = tuple(found[f] for f in ("filter", "version", "kind", "state", "block"))
            except (ValueError, KeyError, TypeError):
                continue  # torn, or the middle of a line
            self._known.append(key)


def _standing(monitor: Monitor) -> list[str]:
    return [kind for kind, finding in monitor.current.items() if finding.state == "raised"]


def _by_source(record: Record) -> list[tuple[dict[str, str], int]]:
    """Windows by what became of them and by the labels of the first group, if there is one."""
    groups = record["groups"]
    labels = groups[min(groups)] if groups else {"": [record["windows"], record["kept"]]}
    found = []
    for source, (seen, kept) in labels.items():
        found.append(({"decision": "kept", "source": source}, kept))
        found.append(({"decision": "dropped", "source": source}, seen - kept))
    return found

"""What the filter saw and kept, block by block, as small records that a monitor reads later.

    statistics = BlockStatistics(run_dir, "train")
    statistics.block(block=7, version=3, scorer=scorer, scores=scores, kept=kept, seconds=0.001)
    read_records(run_dir, "train") -> [record, ...]          merge(records) -> record

One record sums `every_blocks` blocks of one version: a JSON line of about a kilobyte, appended to
`metrics/<name>/` of the run by a single write, or one object a record on stores that are no
directory. Numbers only, never a window. Losing a record loses sight, not training: nothing here
raises into the loader, a failure is counted and warned about once. Cost per block of 512 windows:
some tens of microseconds. A change is seen no earlier than the record that holds it is written, so
a drift alarm within 20 blocks needs `every_blocks <= 8`.

Read next: `monitor/sketch.py` (records as distributions), `monitor/alarms.py` (who reads them).
"""

from __future__ import annotations

import json
import math
import multiprocessing.util
import os
import queue
import re
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from metagrad_filter.counting import warn_once
from metagrad_filter.errors import ConfigError
from metagrad_filter.files import make_directory
from metagrad_filter.ledger import is_name
from metagrad_filter.store import LocalStore, Store, is_key, open_store

FOLDER = "metrics"
FORMAT = 1
BINS = 64
OTHER = "other"

_MAX_FILE_BYTES = 8 * 2**20
_MAX_READ_BYTES = 2 * _MAX_FILE_BYTES  # a file passes the limit by at most one line
_LABELS, _KEYS, _FEATURES, _LABEL_LENGTH = 32, 16, 64, 64
_QUEUED = 64  # records that wait for a slow bucket before more are lost
_FLUSH_SECONDS = 10.0
_COUNTS = ("sequence", "first_block", "last_block", "blocks", "windows", "kept", "uniform_blocks")

_live: weakref.WeakSet[BlockStatistics] = weakref.WeakSet()
_started = 0
_start_lock = threading.Lock()


def bin_edges(reference: Sequence[float] | None) -> np.ndarray | None:
    """Returns the scores between which a version's windows fall in equal shares.

    Args:
      reference: ascending quantiles of the version's scores at equal steps of level from 0 to 1, as
        in the scorer's `metadata["reference"]`; None when the version has none.

    Returns:
      `(63,)` float32 quantiles at levels 1/64 .. 63/64; None when there is no usable reference.
    """
    try:
        values = np.asarray(reference, np.float64)
    except (TypeError, ValueError):
        return None
    if values.ndim != 1 or len(values) < 2 or not np.all(np.isfinite(values)):
        return None
    if np.any(np.diff(values) < 0):
        return None
    levels = np.arange(1, BINS) / BINS
    # As float32, so that a score equal to an edge falls on the same side wherever it is binned.
    return np.interp(levels, np.linspace(0, 1, len(values)), values).astype(np.float32)


class BlockStatistics:
    """Sums blocks and appends records; thread-safe; survives fork and pickling.

    A process that was forked, or that received it by pickle, starts its own session; what the other
    process had not yet written stays there.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      name: the filter's name.
      every_blocks: blocks per record.

    Attributes:
      lost_records: records that could not be written.
      lost_blocks: blocks that could not be summed.

    Raises:
      ConfigError: an argument is out of its domain.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | Store,
        name: str = "default",
        *,
        every_blocks: int = 64,
    ):
        if not is_name(name):
            raise ConfigError(
                f"name is {name!r}, expected 1 to 64 characters a-z, 0-9, '_' or '-', starting "
                "with a letter or digit."
            )
        if isinstance(every_blocks, bool) or not isinstance(every_blocks, int) or every_blocks < 1:
            raise ConfigError(f"every_blocks is {every_blocks!r}, expected an int >= 1.")
        place = open_store(run_dir).describe()
        self.run_dir = place if isinstance(place, str) else os.path.abspath(place)
        self.name = name
        self.every_blocks = every_blocks
        self._begin_process()

    def _begin_process(self) -> None:
        self.lost_records = 0
        self.lost_blocks = 0
        self._lock = threading.Lock()
        self._sum = _Sum()
        self._session = _new_session()
        self._sequence = 0
        self._part = 0
        self._bytes = 0
        self._torn = False
        self._acting: tuple[int, np.ndarray | None] = (-2, None)
        self._sender: _Sender | None = None
        self._finalizer: multiprocessing.util.Finalize | None = None
        _live.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"run_dir": self.run_dir, "name": self.name, "every_blocks": self.every_blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_process()

    def __del__(self):
        if hasattr(self, "_finalizer"):  # else the arguments were refused
            self._write()
            if self._finalizer is not None:
                self._finalizer.cancel()

    def block(
        self,
        *,
        block: int,
        version: int,
        scorer: Any = None,
        scores: np.ndarray | None = None,
        kept: np.ndarray,
        windows: int | None = None,
        groups: Mapping[str, Sequence[Any]] | None = None,
        features: Mapping[str, float | None] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Adds one block; never raises.

        Args:
          block: the block's index.
          version: the scorer's version; 0 uniform, -1 when nothing was asked.
          scorer: the version's scorer, whose `metadata["reference"]` makes the bins.
          scores: `(n,)` float32, or None for a uniform choice.
          kept: `(k,)` positions in the block that were kept.
          windows: n, where `scores` is None and `groups` does not tell it.
          groups: for each key (such as "source") the `n` labels of the block's windows.
          features: numbers that describe the block; None and non-finite ones are left out.
          seconds: time inside the scorer.
        """
        try:
            with self._lock:
                if self._finalizer is None:
                    # Unlike atexit, this also runs at the end of processes that multiprocessing
                    # forks; those forget what was registered before their first statement.
                    self._finalizer = multiprocessing.util.Finalize(
                        None, _flush, args=(weakref.ref(self),), exitpriority=10
                    )
                if self._acting[0] != version or self._sum.blocks >= self.every_blocks:
                    self._write()
                if self._acting[0] != version:
                    metadata = getattr(scorer, "metadata", None) or {}
                    self._acting = (version, bin_edges(metadata.get("reference")))
                self._sum.add(
                    block, version, self._acting[1], scores, kept, windows, groups, features,
                    seconds,
                )  # fmt: skip
                if self._sum.blocks >= self.every_blocks:
                    self._write()
        # Statistics that cannot be made never stop training; the warning and the counter say so.
        except Exception as error:
            self.lost_blocks += 1
            warn_once(
                self.name,
                f"statistics {self.run_dir}",
                f"Block {block} is missing in the statistics ({type(error).__name__}: {error}); "
                "training goes on, the monitor does not see such blocks.",
            )

    def flush(self) -> None:
        """Writes what was summed so far; waits up to 10 s for a bucket; never raises."""
        with self._lock:
            self._write()
            sender = self._sender
        if sender is not None:
            sender.drain(_FLUSH_SECONDS)

    def _write(self) -> None:
        if not self._sum.blocks:
            return
        total, self._sum = self._sum, _Sum()
        try:
            record = total.record(self.name, self._session, self._sequence)
            line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
            self._sequence += 1
            store = open_store(self.run_dir)
            if isinstance(store, LocalStore):
                self._append(store, line)
            else:
                if self._sender is None:
                    self._sender = _Sender(store, self._lose)
                key = f"{FOLDER}/{self.name}/{self._session}-{self._sequence - 1:08d}.json"
                self._sender.send(key, line)
        except Exception as error:
            self._lose(error)

    def _append(self, store: LocalStore, line: bytes) -> None:
        if self._bytes + len(line) > _MAX_FILE_BYTES:
            self._part, self._bytes, self._torn = self._part + 1, 0, False
        part = f"-{self._part:04d}" if self._part else ""
        path = store.describe(f"{FOLDER}/{self.name}/{self._session}{part}.jsonl")
        if not self._bytes:
            make_directory(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        handle = os.open(path, flags, 0o600)
        try:
            # After half a line, a line end keeps the next record whole.
            data = b"\n" + line if self._torn else line
            written = os.write(handle, data)
        finally:
            os.close(handle)
        self._bytes += written
        self._torn = (self._torn and not written) or 0 < written < len(data)
        if written < len(data):
            raise OSError(f"{written} of {len(data)} bytes were written to {path}")

    def _lose(self, error: Exception) -> None:
        self.lost_records += 1
        warn_once(
            self.name,
            f"records {self.run_dir}",
            f"Statistics cannot be written to {FOLDER}/{self.name} of {self.run_dir} ({error}); "
            "training goes on without them. Free space or fix the permissions.",
        )


class _Sum:
    """The blocks of one record."""

    def __init__(self):
        self.blocks = self.windows = self.kept = self.uniform_blocks = 0
        self.first = self.last = self.version = 0
        self.seconds = 0.0
        self.scores = _Moments()
        self.bins: np.ndarray | None = None
        self.kept_bins: np.ndarray | None = None
        self.threshold: list[float] = []
        self.groups: dict[str, dict[str, list[int]]] = {}
        self.features: dict[str, _Moments] = {}

    def add(self, block, version, edges, scores, kept, windows, groups, features, seconds) -> None:
        kept = np.asarray(kept, np.int64)
        groups = groups or {}
        if scores is not None:
            n = len(scores)
        elif windows is not None:
            n = windows
        else:
            n = max((len(labels) for labels in groups.values()), default=len(kept))
        moments, lowest, index = None, None, None
        if scores is not None:
            scores = np.asarray(scores)
            place = None if edges is None else edges.searchsorted(scores, side="right")
            chosen, chosen_place = scores[kept], None if place is None else place[kept]
            # A NaN or inf anywhere shows in the sum, which costs less than a look at each.
            total = float(np.add.reduce(scores, dtype=np.float64))
            if not math.isfinite(total):
                usable, chosen_usable = np.isfinite(scores), np.isfinite(chosen)
                if place is not None and chosen_place is not None:
                    place, chosen_place = place[usable], chosen_place[chosen_usable]
                scores, chosen = scores[usable], chosen[chosen_usable]
                total = float(np.add.reduce(scores, dtype=np.float64))
            if len(scores):
                moments = _Moments.of(scores, total)
            if len(chosen):
                lowest = float(chosen.min())
            if place is not None and chosen_place is not None:
                index = (
                    np.bincount(place, minlength=BINS),
                    np.bincount(chosen_place, minlength=BINS),
                )
        seen = {}
        for key, labels in list(groups.items())[:_KEYS]:
            labels = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
            if len(labels) != n:
                raise ValueError(f"groups[{key!r}] has {len(labels)} labels for {n} windows")
            chosen_labels = map(labels.__getitem__, kept.tolist())
            seen[_label(key)] = Counter(labels), Counter(chosen_labels)
        # Nothing raises from here on, so a block counts as a whole or not at all.
        if moments is not None:
            self.scores.add(moments)
        if lowest is not None:
            self.threshold.append(lowest)
        if index is not None:
            self.bins = index[0] if self.bins is None else self.bins + index[0]
            self.kept_bins = index[1] if self.kept_bins is None else self.kept_bins + index[1]
        for key, (everything, chosen) in seen.items():
            _add_group(self.groups, key, everything, chosen)
        for name, value in (features or {}).items():
            name = _label(name)
            known = name in self.features or len(self.features) < _FEATURES
            if value is not None and math.isfinite(value) and known:
                value = float(value)
                self.features.setdefault(name, _Moments()).add(
                    _Moments(1, value, 0.0, value, value)
                )
        self.first = block if not self.blocks else min(self.first, block)
        self.last = block if not self.blocks else max(self.last, block)
        self.version = version
        self.blocks += 1
        self.windows += n
        self.kept += len(kept)
        self.uniform_blocks += scores is None and version >= 0
        self.seconds += seconds

    def record(self, name: str, session: str, sequence: int) -> dict[str, Any]:
        scores, threshold = None, None
        if self.scores.count:
            scores = self.scores.record(extremes=True) | {
                "bins": None if self.bins is None else self.bins.tolist(),
                "kept_bins": None if self.kept_bins is None else self.kept_bins.tolist(),
            }
        if self.threshold:
            threshold = {
                "mean": math.fsum(self.threshold) / len(self.threshold),
                "minimum": min(self.threshold),
                "maximum": max(self.threshold),
            }
        return {
            "format": FORMAT,
            "name": name,
            "session": session,
            "sequence": sequence,
            "first_block": int(self.first),
            "last_block": int(self.last),
            "blocks": self.blocks,
            "version": int(self.version),
            "windows": int(self.windows),
            "kept": self.kept,
            "uniform_blocks": int(self.uniform_blocks),
            "seconds": float(self.seconds),
            "time": time.time(),
            "scores": scores,
            "threshold": threshold,
            "groups": self.groups,
            "features": {n: m.record(extremes=False) for n, m in self.features.items()},
        }


class _Moments:
    """Count, mean, sum of squared deviations and extremes; adds as Chan et al. (1983)."""

    __slots__ = ("count", "m2", "maximum", "mean", "minimum")

    def __init__(self, count=0, mean=0.0, m2=0.0, minimum=math.inf, maximum=-math.inf):
        self.count, self.mean, self.m2 = count, mean, m2
        self.minimum, self.maximum = minimum, maximum

    @classmethod
    def of(cls, values: np.ndarray, total: float) -> _Moments:
        mean = total / len(values)
        deviations = values.astype(np.float64) - mean
        squares = float(deviations @ deviations)
        return cls(len(values), mean, squares, float(values.min()), float(values.max()))

    def add(self, other: _Moments) -> None:
        count = self.count + other.count
        if not other.count:
            return
        delta = other.mean - self.mean
        self.m2 += other.m2 + delta * delta * self.count * other.count / count
        self.mean += delta * other.count / count
        self.count = count
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def record(self, *, extremes: bool) -> dict[str, Any]:
        fields = {"count": self.count, "mean": self.mean, "m2": self.m2}
        if extremes:
            fields |= {"minimum": self.minimum, "maximum": self.maximum}
        return fields


class _Sender:
    """Writes objects in a thread of its own, so that no block waits for a bucket."""

    def __init__(self, store: Store, lose):
        self._store = store
        self._lose = lose
        self._waiting: queue.Queue[tuple[str, bytes]] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._run, name="metagrad-filter-records")
        self._thread.daemon = True
        self._thread.start()

    def send(self, key: str, data: bytes) -> None:
        try:
            self._waiting.put_nowait((key, data))
        except queue.Full:
            self._lose(TimeoutError(f"{_QUEUED} records are waiting already"))

    def drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _run(self) -> None:
        while True:
            key, data = self._waiting.get()
            try:
                if not self._store.write_once(key, data):
                    self._lose(FileExistsError(f"{key} exists already"))
            # Whatever a store does, training goes on; the warning and the counter say so.
            except Exception as error:
                self._lose(error)
            finally:
                self._waiting.task_done()


class Records(list):
    """Records in order of session and sequence.

    Attributes:
      damaged: lines, or objects, that were no record of format 1 and were left out.
    """

    damaged: int = 0


def read_records(run_dir: str | os.PathLike[str] | Store, name: str | None = None) -> Records:
    """Reads the records of a run, leaving out a torn last line and damaged lines.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      name: the filter's name; None for every filter of the run.

    Returns:
      The records, sorted by session and sequence, with `.damaged`; empty when there are none.

    Raises:
      ConfigError: `run_dir` or `name` is out of its domain.
      OSError: the store cannot be read.
    """
    if name is not None and not is_name(name):
        raise ConfigError(f"name is {name!r}, expected the name of a filter, or None for all.")
    store = open_store(run_dir)
    records = Records()
    for filter_name in sorted(filter(is_name, store.names(FOLDER))) if name is None else [name]:
        folder = f"{FOLDER}/{filter_name}"
        for file in sorted(store.names(folder)):
            if not is_key(file) or not file.endswith((".jsonl", ".json")):
                continue
            try:
                data = store.read(f"{folder}/{file}", _MAX_READ_BYTES)
            except (ValueError, FileNotFoundError):
                records.damaged += 1
                continue
            for line in data.split(b"\n"):
                if not line:
                    continue
                record = parse_record(line)
                if record is None or record["name"] != filter_name:
                    records.damaged += 1
                else:
                    records.append(record)
    records.sort(key=lambda record: (record["session"], record["sequence"]))
    return records


def merge(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds records of one filter and one version.

    Args:
      records: of `read_records`, at least one, in any order.

    Returns:
      A record over all their blocks; `session` and `sequence` are those of the last one where the
      records come from several. Bins are None unless every scored record has them.

    Raises:
      ConfigError: there are none, or several filters or versions, whose bins do not add up.
    """
    records = sorted(records, key=lambda record: (record["session"], record["sequence"]))
    kinds = sorted({(record["name"], record["version"]) for record in records})
    if len(kinds) != 1:
        raise ConfigError(
            f"records are of {kinds or 'nothing'}, expected one filter and one version; merge the "
            "records of each version apart."
        )
    merged = dict(records[-1])
    merged["first_block"] = min(record["first_block"] for record in records)
    merged["last_block"] = max(record["last_block"] for record in records)
    merged["time"] = max(record["time"] for record in records)
    for field in ("blocks", "windows", "kept", "uniform_blocks", "seconds"):
        merged[field] = sum(record[field] for record in records)
    merged["scores"] = _merge_scores([r["scores"] for r in records if r["scores"] is not None])
    thresholds = [(r["blocks"] - r["uniform_blocks"], r["threshold"]) for r in records]
    thresholds = [(weight, threshold) for weight, threshold in thresholds if threshold is not None]
    merged["threshold"] = None
    if thresholds:
        weight = sum(weight for weight, _ in thresholds) or 1
        merged["threshold"] = {
            "mean": math.fsum(w * threshold["mean"] for w, threshold in thresholds) / weight,
            "minimum": min(threshold["minimum"] for _, threshold in thresholds),
            "maximum": max(threshold["maximum"] for _, threshold in thresholds),
        }
    groups: dict[str, dict[str, list[int]]] = {}
    features: dict[str, _Moments] = {}
    for record in records:
        for key, labels in record["groups"].items():
            everything = {label: counts[0] for label, counts in labels.items()}
            _add_group(groups, key, everything, {label: c[1] for label, c in labels.items()})
        for name, fields in record["features"].items():
            features.setdefault(name, _Moments()).add(_Moments(**fields))
    merged["groups"] = groups
    merged["features"] = {name: m.record(extremes=False) for name, m in features.items()}
    return merged


def _merge_scores(scores: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not scores:
        return None
    moments = _Moments()
    for fields in scores:
        names = ("count", "mean", "m2", "minimum", "maximum")
        moments.add(_Moments(**{name: fields[name] for name in names}))
    merged = moments.record(extremes=True)
    for field in ("bins", "kept_bins"):
        counts = [fields[field] for fields in scores]
        known = all(c is not None for c in counts)
        merged[field] = np.sum(counts, axis=0).tolist() if known else None
    return merged


def _add_group(
    groups: dict[str, dict[str, list[int]]],
    key: str,
    everything: Mapping[Any, int],
    chosen: Mapping[Any, int],
) -> None:
    table = groups.setdefault(key, {})
    for value, seen in everything.items():
        label = _label(value)
        if label not in table and sum(name != OTHER for name in table) >= _LABELS:
            label = OTHER
        counts = table.setdefault(label, [0, 0])
        counts[0] += seen
        counts[1] += chosen.get(value, 0)


def _label(value: Any) -> str:
    return str(value)[:_LABEL_LENGTH]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a line, or None when it is none."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or record["format"] != FORMAT:
            return None
        whole = all(isinstance(record[f], int) and record[f] >= 0 for f in _COUNTS)
        texts = all(isinstance(record[field], str) for field in ("name", "session"))
        numbers = all(isinstance(record[field], int | float) for field in ("seconds", "time"))
        groups = all(
            len(counts) == 2 and all(isinstance(c, int) and c >= 0 for c in counts)
            for labels in record["groups"].values()
            for counts in labels.values()
        )
        features = all(_are_moments(fields) for fields in record["features"].values())
        scores = record["scores"] is None or _are_scores(record["scores"])
        limits = ("mean", "minimum", "maximum")
        threshold = record["threshold"] is None or all(
            math.isfinite(record["threshold"][field]) for field in limits
        )
        version = isinstance(record["version"], int)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    parts = (whole, texts, numbers, groups, features, scores, threshold, version)
    return record if all(parts) else None


def _are_moments(fields: Mapping[str, Any]) -> bool:
    return (
        isinstance(fields["count"], int)
        and fields["count"] > 0
        and math.isfinite(fields["mean"])
        and 0 <= fields["m2"] < math.inf
    )


def _are_scores(scores: Mapping[str, Any]) -> bool:
    bins = all(
        counts is None
        or (len(counts) == BINS and all(isinstance(c, int) and c >= 0 for c in counts))
        for counts in (scores["bins"], scores["kept_bins"])
    )
    extremes = math.isfinite(scores["minimum"]) and math.isfinite(scores["maximum"])
    return _are_moments(scores) and bins and extremes


def _new_session() -> str:
    """Returns `<host>-<pid>-<start ns>`, unlike any other of this machine."""
    global _started
    host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())[:64].lstrip(".") or "host"
    with _start_lock:
        _started = max(time.time_ns(), _started + 1)
        return f"{host}-{os.getpid()}-{_started}"


def _flush(reference: weakref.ref[BlockStatistics]) -> None:
    statistics = reference()
    if statistics is not None:
        statistics.flush()


def _after_fork() -> None:
    """Gives a forked child locks that nobody holds and sessions of its own."""
    global _start_lock
    _start_lock = threading.Lock()
    for statistics in list(_live):
        statistics._begin_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

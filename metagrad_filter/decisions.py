"""Which scorer ranks an interval, in one process: ledger first, registry second, never a stop.

    Decisions(run_dir, name).scorer(interval) -> (version, Scorer or None)

What the ledger holds for an interval is what acts. An undecided interval takes the newest verified
version and records it. Where that cannot be done the stream goes on, with one warning and a
counter: no version yet, none that verifies or a registry out of reach gives the uniform choice
(version 0); a ledger that cannot be written, or does not answer in time, gives the last version
that acted; a decided version that is lost gives the uniform choice. Only where a run starts or
resumes, and somebody looks on, is a decision that cannot be honoured an error.

Cost: once an interval one ledger read, one write and one look at what the registry's watcher has
loaded. A store that hangs costs two seconds an interval and no more.

Read next: `ledger.py`, `registry.py`, `watch.py`, `blocks.py` (who asks).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from typing import Any

from metagrad_filter.counting import count, warn_once
from metagrad_filter.errors import ScorerRejected, StateMismatch
from metagrad_filter.ledger import Ledger
from metagrad_filter.registry import Registry
from metagrad_filter.watch import Newest, Watcher

UNDECIDED = -1
UNIFORM = 0

_SCORERS_KEPT = 4
_INTERVALS_KEPT = 1024

# Seconds: how long a decision may take before training goes on without it, how long it may take
# where a run starts, and how long a fresh look at the registry is waited for.
_PATIENCE, _PATIENCE_AT_START, _LOOK = 2.0, 30.0, 1.0


class Decisions:
    """The decisions and loaded scorers of one filter in one process; thread-safe.

    Args:
      run_dir: the run's directory.
      name: the filter's name.
    """

    def __init__(self, run_dir: str | os.PathLike[str], name: str):
        self._name = name
        self._registry = Registry(run_dir)
        self._watcher = Watcher(self._registry)
        self._ledger = Ledger(run_dir, name)
        self._lock = threading.Lock()
        self._versions: OrderedDict[int, int] = OrderedDict()
        self._scorers: OrderedDict[int, Any] = OrderedDict()

    def scorer(
        self, interval: int, expected: int = UNDECIDED, *, strict: bool = False
    ) -> tuple[int, Any]:
        """Returns the version that ranks an interval, and its scorer.

        Args:
          interval: index of the interval of blocks.
          expected: the version that a checkpoint recorded for a block of the interval, or -1.
          strict: whether a decision that cannot be honoured is an error, as it should be when a
            run starts or resumes; else the interval is kept uniformly and counted.

        Returns:
          `(version, scorer)`; `(0, None)` for the uniform choice.

        Raises:
          ScorerRejected: the decided version can no longer be loaded as it was (where strict or
            expected by a checkpoint).
          StateMismatch: the checkpoint's version is not the ledger's; or the ledger is damaged
            (where strict or expected by a checkpoint).
        """
        with self._lock:
            version = self._versions.get(interval)
            try:
                if version is None:
                    version, scorer = self._decide_in_time(interval, expected, strict)
                    _remember(self._versions, interval, version, _INTERVALS_KEPT)
                    if scorer is not None:
                        _remember(self._scorers, version, scorer, _SCORERS_KEPT)
                if expected == UNIFORM != version:
                    # The writer of the checkpoint could not use the version; nor shall this block.
                    return UNIFORM, None
                if expected not in (UNDECIDED, version):
                    raise StateMismatch(
                        f"The checkpoint used scorer version {expected} for interval {interval}, "
                        f"the ledger {self._ledger.directory} holds version {version}; resume "
                        "with the run_dir that the checkpoint was written with."
                    )
                if version == UNIFORM:
                    return UNIFORM, None
                scorer = self._scorers.get(version)
                if scorer is None:
                    scorer = self._load(version).scorer
            except (ScorerRejected, StateMismatch) as error:
                if strict or expected != UNDECIDED:
                    raise
                self._lose(interval, error)
                return UNIFORM, None
            _remember(self._scorers, version, scorer, _SCORERS_KEPT)
            return version, scorer

    def _decide_in_time(self, interval: int, expected: int, strict: bool) -> tuple[int, Any]:
        """Decides in a thread, so that a store that hangs cannot hang the loader."""
        patience = _PATIENCE_AT_START if strict else _PATIENCE
        # What acted last here, and not what the ledger says: it may be what does not answer.
        used = [i for i in self._versions if i < interval]
        last = self._versions[max(used)] if used else UNIFORM
        answer: list[tuple[int, Any]] = []
        failure: list[BaseException] = []

        def decide():
            try:
                answer.append(self._decide(interval, expected, last))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=decide, name="metagrad-filter-decide", daemon=True)
        thread.start()
        thread.join(patience)
        if failure:
            raise failure[0]
        if answer:
            return answer[0]
        self._unrecorded(interval, TimeoutError(f"no answer within {patience:g} s"))
        return last, None

    def _decide(self, interval: int, expected: int, last: int) -> tuple[int, Any]:
        """Returns the interval's version and scorer: as recorded, else decided now."""
        found: Newest | None = None
        try:
            entry = self._ledger.read(interval)
            if entry is None:
                if expected == UNDECIDED:
                    found = self._newest()
                elif expected != UNIFORM:
                    # A checkpoint remembers what a lost ledger does not.
                    found = self._load(expected)
                if found is None:
                    self._ledger.decide(interval, UNIFORM)
                else:
                    self._ledger.decide(interval, found.version, _digest(found))
                entry = self._ledger.read(interval)
        except OSError as error:
            self._unrecorded(interval, error)
            # A ledger that can be read and not written still says what acted before.
            with contextlib.suppress(OSError):
                earlier = [e.version for i, e in self._ledger.entries().items() if i < interval]
                last = earlier[-1] if earlier else last
            return last, None
        if entry is None:
            raise StateMismatch(
                f"The decision for interval {interval} vanished from "
                f"{self._ledger.directory}; restore the ledger."
            )
        if entry.version == UNIFORM:
            return UNIFORM, None
        if found is None or (found.version, _digest(found)) != (
            entry.version,
            entry.manifest_sha256,
        ):
            found = self._load(entry.version, entry.manifest_sha256)
        return entry.version, found.scorer

    def _newest(self) -> Newest | None:
        skipped = self._watcher.rejections.total()
        found = self._watcher.refresh(_LOOK)
        count(self._name, versions_skipped=self._watcher.rejections.total() - skipped)
        return found

    def _unrecorded(self, interval: int, error: OSError) -> None:
        """Says that training goes on without a record: it does not stop for a full disk."""
        count(self._name, ledger_unwritable=1)
        warn_once(
            self._name,
            f"ledger {self._ledger.directory}",
            f"The decision for interval {interval} cannot be recorded in "
            f"{self._ledger.directory} ({error}); going on with the last recorded version, "
            "but this part of the stream may differ when it is read again.",
        )

    def _lose(self, interval: int, error: Exception) -> None:
        """Keeps an interval uniformly: a lost scorer never stops training."""
        _remember(self._versions, interval, UNIFORM, _INTERVALS_KEPT)
        count(self._name, versions_lost=1)
        warn_once(
            self._name,
            f"lost {interval} {self._ledger.directory}",
            f"{error} Training goes on: interval {interval} is kept uniformly in this process.",
        )

    def _load(self, version: int, digest: str | None = None) -> Newest:
        """Loads a decided version; with a digest, only the one that has it."""
        try:
            scorer, manifest = self._registry.load_with_manifest(version)
        except ScorerRejected as error:
            raise ScorerRejected(
                f"Scorer version {version} is recorded in the ledger {self._ledger.directory} and "
                f"can no longer be used, so the stream cannot be replayed: {error} Restore the "
                "file, or give the filter another name= to decide anew.",
                reason=error.reason,
            ) from error
        if digest is not None and manifest["manifest_sha256"] != digest:
            raise ScorerRejected(
                f"Scorer version {version} in {self._registry.directory} is not the one that the "
                f"ledger {self._ledger.directory} recorded (another hash); restore the original "
                "file, or give the filter another name= to decide anew.",
                reason="changed",
            )
        return Newest(version, scorer, manifest)


def _digest(found: Newest) -> str:
    return found.manifest["manifest_sha256"]


def _remember(cache: OrderedDict, key: Any, value: Any, limit: int) -> None:
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > limit:
        cache.popitem(last=False)

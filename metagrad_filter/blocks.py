"""The filter without a loader: one block of elements in, the positions to keep out.

    BlockFilter(config).choose(block, start, elements) -> Choice(kept, scores, version)

Every loader's shell (`transform.py` for grain, `adapters/` for the others) reads M elements, asks
here, and hands on what is kept. A choice is a pure function of the elements, the configuration,
the block's index and the version that the ledger holds for the block's interval, so any process
that sees the same block keeps the same windows. Cost per block: one stack, one scorer call, one
sort; per interval: one look at the registry and one small file.

Read next: `transform.py`.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, ScorerRejected, StateMismatch, WindowError
from metagrad_filter.ledger import Ledger
from metagrad_filter.registry import Registry
from metagrad_filter.scorer.scorer import Scorer
from metagrad_filter.selection import as_ratio, as_share, kept_before, select
from metagrad_filter.windows import SeriesWindows, TextWindows, Windows

UNDECIDED = -1
UNIFORM = 0

_SCORERS_KEPT = 4
_INTERVALS_KEPT = 1024


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What makes a filter's decisions, validated; small and picklable.

    Attributes:
      run_dir: local directory that holds `registry/` and `ledger/`.
      keep_ratio: share of windows kept, in (0, 1].
      windows: how an element becomes an array.
      block_windows: M, windows ranked together.
      swap_every_blocks: blocks per interval; the version may change between intervals.
      seed: keys all randomness, with `name` and the block.
      name: the ledger's name; one per filter of a run.
      explore: share of the kept windows drawn uniformly, in [0, 1].
      annotate: add `score` and `scorer_version` to kept elements.
      order: "index" when blocks are numbered by the source's index, "iterator" when each iterator
        counts its own blocks.
    """

    run_dir: str
    keep_ratio: Fraction
    windows: Windows
    block_windows: int = 512
    swap_every_blocks: int = 64
    seed: int = 0
    name: str = "default"
    explore: Fraction = Fraction(0)
    annotate: bool = False
    order: str = "index"

    def __post_init__(self):
        run_dir = os.fspath(self.run_dir)
        if "://" in run_dir:
            raise ConfigError(f"run_dir is {run_dir!r}, expected a local or mounted directory.")
        # Absolute, because worker processes may start elsewhere.
        object.__setattr__(self, "run_dir", os.path.abspath(run_dir))
        object.__setattr__(self, "keep_ratio", as_ratio(self.keep_ratio))
        object.__setattr__(self, "explore", as_share(self.explore))
        for field in ("block_windows", "swap_every_blocks"):
            _check_count(field, getattr(self, field), 1)
        _check_count("seed", self.seed, 0)
        if not isinstance(self.windows, (TextWindows, SeriesWindows)):
            raise ConfigError(
                f"windows is {self.windows!r}, expected TextWindows(...) or SeriesWindows(...)."
            )
        Ledger(self.run_dir, self.name)

    def record(self) -> dict[str, Any]:
        """Returns the fields that decide what is kept, as JSON types."""
        return {
            "keep_ratio": str(self.keep_ratio),
            "windows": {"kind": self.windows.kind, **dataclasses.asdict(self.windows)},
            "block_windows": self.block_windows,
            "swap_every_blocks": self.swap_every_blocks,
            "seed": self.seed,
            "explore": str(self.explore),
            "order": self.order,
        }

    def bind(self) -> None:
        """Records this configuration in the ledger, or checks it against the recorded one.

        Raises:
          StateMismatch: the ledger's name was used with another configuration.
          ConfigError: `run_dir` cannot be written.
        """
        try:
            Ledger(self.run_dir, self.name).bind(self.record())
        except OSError as error:
            raise ConfigError(
                f"run_dir {self.run_dir} cannot be used: {error}; the filter keeps its ledger "
                "there, so name a directory that this process can write."
            ) from error


@dataclass(frozen=True, eq=False)
class Choice:
    """What a block keeps.

    Attributes:
      kept: `(k,)` int64 ascending positions in the block.
      scores: `(n,)` float32 of all windows, or None for a uniform choice.
      version: the scorer's version; 0 uniform, -1 when all or none are kept and nothing is asked.
    """

    kept: np.ndarray
    scores: np.ndarray | None
    version: int

    def annotated(self, position: int, element: Any) -> dict[str, Any]:
        """Returns a copy of a kept element with `score` and `scorer_version`."""
        if not isinstance(element, dict):
            raise WindowError(
                f"annotate=True needs dict elements, got {type(element).__name__}; "
                "wrap the window in a dict before the filter, or leave annotate=False."
            )
        score = np.float32(np.nan) if self.scores is None else self.scores[position]
        return {**element, "score": score, "scorer_version": max(self.version, UNIFORM)}


@dataclass
class FilterCounters:
    """What one filter did in one process, since the process started.

    Attributes:
      blocks: blocks chosen.
      uniform_blocks: of these, blocks kept uniformly because there was no scorer.
      windows_seen: windows offered.
      windows_kept: windows kept.
      scoring_seconds: time inside scorers, in seconds of monotonic clock.
      non_finite_scores: scores that were NaN or inf and therefore ranked last.
      versions_skipped: corrupt versions passed over at a decision.
      ledger_unwritable: decisions that could not be recorded.
    """

    blocks: int = 0
    uniform_blocks: int = 0
    windows_seen: int = 0
    windows_kept: int = 0
    scoring_seconds: float = 0.0
    non_finite_scores: int = 0
    versions_skipped: int = 0
    ledger_unwritable: int = 0


_counters: dict[str, FilterCounters] = {}
_counters_lock = threading.Lock()


def counters(name: str = "default") -> FilterCounters:
    """Returns a snapshot of this process's counters for the filter `name`."""
    with _counters_lock:
        return dataclasses.replace(_counters.get(name, FilterCounters()))


def _count(name: str, **increments: float) -> None:
    with _counters_lock:
        mine = _counters.setdefault(name, FilterCounters())
        for field, increment in increments.items():
            setattr(mine, field, getattr(mine, field) + increment)


class BlockFilter:
    """Chooses within blocks; thread-safe; holds the loaded scorers of one process.

    Args:
      config: the filter's configuration.
      clock: seconds, monotonic; only for `FilterCounters.scoring_seconds`.
    """

    def __init__(self, config: FilterConfig, *, clock=time.monotonic):
        self.config = config
        self._clock = clock
        self._registry = Registry(config.run_dir)
        self._ledger = Ledger(config.run_dir, config.name)
        self._lock = threading.Lock()
        self._decisions: OrderedDict[int, int] = OrderedDict()
        self._scorers: OrderedDict[int, Scorer] = OrderedDict()
        self._warned_unwritable = False

    def quota(self, start: int, n: int) -> int:
        """Returns how many of the windows `start .. start + n - 1` are kept."""
        ratio = self.config.keep_ratio
        return kept_before(start + n, ratio) - kept_before(start, ratio)

    def choose(
        self, block: int, start: int, elements: Sequence[Any], *, expected: int = UNDECIDED
    ) -> Choice:
        """Chooses which elements of a block are kept.

        Args:
          block: the block's index, counted on over epochs.
          start: windows of the epoch before this block; fixes the quota.
          elements: the block's `n <= M` elements.
          expected: the version that a checkpoint recorded for this block, or -1.

        Returns:
          The choice.

        Raises:
          WindowError: the elements cannot be read as windows, or hold ids out of range.
          ScorerRejected: the decided version can no longer be loaded as it was.
          StateMismatch: the checkpoint's version is not the ledger's.
          ConfigError: the scorer is for another kind of windows.
        """
        n = len(elements)
        k = self.quota(start, n)
        if not self.config.annotate and k in (0, n):
            _count(self.config.name, blocks=1, windows_seen=n, windows_kept=k)
            return Choice(np.arange(k), None, UNDECIDED)
        config = self.config
        version, scorer = self._scorer_of(block // config.swap_every_blocks, expected)
        scores = None
        if scorer is not None:
            scores = self._score(scorer, elements)
        kept = select(
            scores,
            n,
            k,
            strength=scorer.strength if scorer is not None else 0.0,
            explore=config.explore,
            seed=config.seed,
            name=config.name,
            block=block,
        )
        _count(config.name, blocks=1, windows_seen=n, windows_kept=k, uniform_blocks=scores is None)
        return Choice(kept, scores, version)

    def _score(self, scorer: Scorer, elements: Sequence[Any]) -> np.ndarray:
        windows = self.config.windows
        if scorer.kind != windows.kind:
            raise ConfigError(
                f"The scorer reads {scorer.kind} windows, the filter was given {windows.kind} "
                "windows; use the matching windows=, or another run_dir."
            )
        stacked = windows.stack(elements)
        began = self._clock()
        if isinstance(windows, TextWindows) and windows.pad_id is not None:
            scores = scorer.score(stacked, pad_id=windows.pad_id)
        else:
            scores = scorer.score(stacked)
        _count(
            self.config.name,
            scoring_seconds=self._clock() - began,
            non_finite_scores=int(np.count_nonzero(~np.isfinite(scores))),
        )
        return scores

    def _scorer_of(self, interval: int, expected: int) -> tuple[int, Scorer | None]:
        with self._lock:
            version = self._decisions.get(interval)
            if version is None:
                version = self._decide(interval, expected)
                _remember(self._decisions, interval, version, _INTERVALS_KEPT)
            if expected not in (UNDECIDED, version):
                raise StateMismatch(
                    f"The checkpoint used scorer version {expected} for interval {interval}, the "
                    f"ledger {self._ledger.directory} holds version {version}; resume with the "
                    "run_dir that the checkpoint was written with."
                )
            if version == UNIFORM:
                return UNIFORM, None
            if version not in self._scorers:
                self._load(version)
            self._scorers.move_to_end(version)
            return version, self._scorers[version]

    def _decide(self, interval: int, expected: int) -> int:
        """Returns the interval's version: as recorded, else decided now."""
        entry = self._ledger.read(interval)
        if entry is None:
            # A checkpoint remembers what a lost ledger does not.
            version = self._newest() if expected == UNDECIDED else expected
            digest = self._load(version) if version != UNIFORM else ""
            try:
                self._ledger.decide(interval, version, digest)
            except OSError as error:
                return self._undecidable(interval, error)
            entry = self._ledger.read(interval)
            if entry is None:
                raise StateMismatch(
                    f"The decision for interval {interval} vanished from "
                    f"{self._ledger.directory}; restore the ledger."
                )
        if entry.version != UNIFORM:
            self._load(entry.version, entry.manifest_sha256)
        return entry.version

    def _newest(self) -> int:
        skipped = self._registry.rejections.total()
        try:
            found = self._registry.latest_verified()
        except OSError as error:
            warnings.warn(
                f"The registry cannot be listed ({error}); this interval is kept uniformly.",
                RuntimeWarning,
                stacklevel=2,
            )
            found = None
        _count(self.config.name, versions_skipped=self._registry.rejections.total() - skipped)
        return UNIFORM if found is None else found[0]

    def _undecidable(self, interval: int, error: OSError) -> int:
        """Goes on with the last recorded version: training does not stop for a full disk."""
        _count(self.config.name, ledger_unwritable=1)
        if not self._warned_unwritable:
            self._warned_unwritable = True
            warnings.warn(
                f"The decision for interval {interval} cannot be recorded in "
                f"{self._ledger.directory} ({error}); going on with the last recorded version, "
                "but this part of the stream may differ when it is read again.",
                RuntimeWarning,
                stacklevel=2,
            )
        earlier = [e for i, e in self._ledger.entries().items() if i < interval]
        if earlier and earlier[-1].version != UNIFORM:
            self._load(earlier[-1].version, earlier[-1].manifest_sha256)
        return earlier[-1].version if earlier else UNIFORM

    def _load(self, version: int, digest: str | None = None) -> str:
        """Loads a decided version into the cache; returns its manifest's hash."""
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
        _remember(self._scorers, version, scorer, _SCORERS_KEPT)
        return manifest["manifest_sha256"]


def _remember(cache: OrderedDict, key: Any, value: Any, limit: int) -> None:
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > limit:
        cache.popitem(last=False)


def _check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}, expected an int >= {low}.")

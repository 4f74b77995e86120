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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from metagrad_filter.blockstats import BlockStatistics
from metagrad_filter.counting import count, warn_once
from metagrad_filter.decisions import UNDECIDED, UNIFORM, Decisions
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.ledger import Ledger
from metagrad_filter.monitor.sinks import export_block, exported
from metagrad_filter.selection import Cap, as_ratio, as_share, kept_before, select
from metagrad_filter.spool import Spool
from metagrad_filter.store import LocalStore, open_store
from metagrad_filter.windows import SeriesWindows, TextWindows, Windows

RULES = ("block", "threshold")
BAD_WINDOWS = ("raise", "last")

# Blocks a record: few enough that an alarm comes within 20 blocks of a change.
_STATISTICS_BLOCKS = 8
_STATISTICS_BLOCKS_REMOTE = 64  # there a record is an object of its own


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What makes a filter's decisions, validated; small and picklable.

    Attributes:
      run_dir: directory or URL that holds `registry/` and `ledger/` (see `open_store`).
      keep_ratio: share of windows kept, in (0, 1].
      windows: how an element becomes an array.
      block_windows: M, windows ranked together.
      swap_every_blocks: blocks per interval; the version may change between intervals.
      seed: keys all randomness, with `name` and the block.
      name: the ledger's name; one per filter of a run.
      explore: share of the kept windows drawn uniformly, in [0, 1].
      annotate: add `score` and `scorer_version` to kept elements.
      caps: limits per group of windows within a block.
      rule: "block" keeps exactly k of every M; "threshold" decides on one window at a time.
      bad_windows: "raise" ends with a `WindowError` where a window cannot be read; "last" ranks it
        last and counts it.
      source_key: the entry of a dict element that names its source, for the monitor.
      statistics: append what was seen and kept to `metrics/` of the run, for the monitor.
      spool_share: share of raw windows that is set aside in `spool/` of the run for calibration.
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
    caps: tuple[Cap, ...] = ()
    rule: str = "block"
    bad_windows: str = "raise"
    source_key: str | None = None
    statistics: bool = True
    spool_share: float = 0.0
    order: str = "index"

    def __post_init__(self):
        store = open_store(self.run_dir)
        place = store.describe()
        # Absolute, because worker processes may start elsewhere.
        place = place if isinstance(place, str) else os.path.abspath(place)
        object.__setattr__(self, "run_dir", place)
        object.__setattr__(self, "keep_ratio", as_ratio(self.keep_ratio))
        object.__setattr__(self, "explore", as_share(self.explore))
        for field in ("block_windows", "swap_every_blocks"):
            _check_count(field, getattr(self, field), 1)
        _check_count("seed", self.seed, 0)
        if not isinstance(self.windows, (TextWindows, SeriesWindows)):
            raise ConfigError(
                f"windows is {self.windows!r}, expected TextWindows(...) or SeriesWindows(...)."
            )
        for field, options in (("rule", RULES), ("bad_windows", BAD_WINDOWS)):
            if getattr(self, field) not in options:
                raise ConfigError(
                    f"{field} is {getattr(self, field)!r}, expected one of {list(options)}."
                )
        if self.source_key is not None and not isinstance(self.source_key, str):
            raise ConfigError(
                f"source_key is {self.source_key!r}, expected the name of an entry, or None."
            )
        if not isinstance(self.statistics, bool):
            raise ConfigError(f"statistics is {self.statistics!r}, expected True or False.")
        object.__setattr__(self, "spool_share", float(as_share(self.spool_share, "spool_share")))
        caps = (self.caps,) if isinstance(self.caps, Cap) else tuple(self.caps)
        if not all(isinstance(cap, Cap) for cap in caps):
            raise ConfigError(f"caps is {self.caps!r}, expected Cap(...) objects.")
        object.__setattr__(self, "caps", caps)
        if self.rule == "threshold" and self.spool_share:
            raise ConfigError(
                "spool_share needs rule='block': a sample is drawn from windows that are read "
                "together."
            )
        if self.rule == "threshold" and caps:
            raise ConfigError(
                "caps need rule='block': a limit per group is kept among windows that are chosen "
                "together."
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
            "caps": [cap.record() for cap in self.caps],
            "rule": self.rule,
            "bad_windows": self.bad_windows,
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
        score = np.float32(np.nan) if self.scores is None else self.scores[position]
        return annotated(element, score, self.version)


def annotated(element: Any, score: np.float32, version: int) -> dict[str, Any]:
    """Returns a copy of a dict element with `score` and `scorer_version`."""
    if not isinstance(element, dict):
        raise WindowError(
            f"annotate=True needs dict elements, got {type(element).__name__}; "
            "wrap the window in a dict before the filter, or leave annotate=False."
        )
    return {**element, "score": score, "scorer_version": max(version, UNIFORM)}


class Watched:
    """Hands blocks to the run's statistics; does nothing where they are switched off."""

    def __init__(self, config: FilterConfig):
        self._config = config
        local = isinstance(open_store(config.run_dir), LocalStore)
        every = _STATISTICS_BLOCKS if local else _STATISTICS_BLOCKS_REMOTE
        self._statistics = (
            BlockStatistics(config.run_dir, config.name, every_blocks=every)
            if config.statistics
            else None
        )

    def block(
        self,
        block: int,
        version: int,
        scorer: Any,
        scores: np.ndarray | None,
        kept: np.ndarray,
        sources: Sequence[Any] | None,
        windows: int,
        seconds: float,
        sample: Any = None,
    ) -> None:
        """Adds one block; `sources` names the source of each of its windows, or is None.

        `sample` is one of its elements, by which tokens are counted.
        """
        self._export(block, version, scores, kept, sources, windows, seconds, sample)
        if self._statistics is not None:
            self._statistics.block(
                block=block,
                version=version,
                scorer=scorer,
                scores=scores,
                kept=kept,
                windows=windows,
                groups=None if sources is None else {"source": sources},
                seconds=seconds,
            )

    def _export(self, block, version, scores, kept, sources, windows, seconds, sample) -> None:
        """Counts the block for the exporter of several processes, where there is one."""
        try:
            sink = exported()
            if sink is None:
                return
            export_block(
                sink,
                block=block,
                version=version,
                kept=kept.tolist(),
                windows=windows,
                sources=sources,
                tokens=0 if sample is None else self._config.windows.stack([sample]).shape[1],
                threshold=None if scores is None or not len(kept) else float(scores[kept].min()),
                target=float(self._config.keep_ratio),
                seconds=seconds,
            )
        # Numbers for a dashboard never stop training; the warning says that they are missing.
        except Exception as error:
            warn_once(
                self._config.name,
                "export",
                f"Prometheus does not get the filter's numbers ({type(error).__name__}: {error}); "
                "training goes on without them.",
            )

    def source(self, element: Any) -> str:
        """Returns the name of an element's source; elements without one are told apart."""
        key = self._config.source_key
        value = element.get(key) if isinstance(element, Mapping) else None
        if isinstance(value, (np.ndarray, np.generic)) and value.size == 1:
            value = value.item()
        return "unknown" if value is None else str(value)


class WindowScorer:
    """Scores elements with whatever version acts; what blocks and single windows have in common.

    Args:
      config: the filter's configuration.
      clock: seconds, monotonic; only for `FilterCounters.scoring_seconds`.
    """

    def __init__(self, config: FilterConfig, *, clock=time.monotonic):
        self._config = config
        self._clock = clock
        self._decisions = Decisions(config.run_dir, config.name)
        self._started = False
        self.watched = Watched(config)

    def version(self, block: int, expected: int = UNDECIDED) -> tuple[int, Any]:
        """Returns the version that ranks a block and its scorer; `(0, None)` for uniform.

        Raises:
          ScorerRejected: at the start, the decided version can no longer be loaded as it was.
          StateMismatch: the checkpoint's version is not the ledger's.
          ConfigError: at the start, the scorer is for another kind of windows.
        """
        config = self._config
        interval = block // config.swap_every_blocks
        version, scorer = self._decisions.scorer(interval, expected, strict=not self._started)
        if scorer is not None and scorer.kind != config.windows.kind:
            message = (
                f"The scorer reads {scorer.kind} windows, the filter was given "
                f"{config.windows.kind} windows; use the matching windows=, or another run_dir."
            )
            if not self._started:
                raise ConfigError(message)
            count(config.name, versions_lost=1)
            warn_once(
                config.name,
                f"kind {version} {config.run_dir}",
                f"{message} Training goes on: version {version} keeps windows uniformly.",
            )
            version, scorer = UNIFORM, None
        self._started = True
        return version, scorer

    def scores(self, scorer: Any, elements: Sequence[Any]) -> tuple[np.ndarray | None, float]:
        """Returns `(n,)` float32 scores and the seconds they took; raises `WindowError`.

        The scores are None when there is no scorer, or when it failed.
        """
        if scorer is None:
            return None, 0.0
        config = self._config
        began = self._clock()
        try:
            scores = self._score(scorer, elements)
        except WindowError:
            raise
        # Whatever a scorer does, training goes on; the warning and the counter say that it did.
        except Exception as error:
            count(config.name, scorer_failures=1)
            warn_once(
                config.name,
                f"failure {config.run_dir}",
                f"The scorer failed ({type(error).__name__}: {error}); these windows are kept "
                "uniformly. `metagrad-filter doctor` looks for the reason.",
            )
            return None, self._clock() - began
        seconds = self._clock() - began
        count(
            config.name,
            scoring_seconds=seconds,
            non_finite_scores=int(np.count_nonzero(~np.isfinite(scores))),
        )
        return scores, seconds

    def _score(self, scorer: Any, elements: Sequence[Any]) -> np.ndarray:
        windows = self._config.windows
        options = {}
        if isinstance(windows, TextWindows) and windows.pad_id is not None:
            options["pad_id"] = windows.pad_id
        try:
            return scorer.score(windows.stack(elements), **options)
        except WindowError:
            if self._config.bad_windows == "raise":
                raise
        scores = np.full(len(elements), np.nan, np.float32)
        for position, element in enumerate(elements):
            try:
                scores[position] = scorer.score(windows.stack([element]), **options)[0]
            except WindowError as error:
                count(self._config.name, bad_windows=1)
                warn_once(
                    self._config.name,
                    f"bad {self._config.run_dir}",
                    f"A window cannot be read and ranks last: {error}",
                )
        return scores


class BlockFilter:
    """Chooses within blocks; thread-safe; holds the loaded scorers of one process.

    Args:
      config: the filter's configuration.
      clock: seconds, monotonic; only for `FilterCounters.scoring_seconds`.
    """

    def __init__(self, config: FilterConfig, *, clock=time.monotonic):
        self.config = config
        self._scorer = WindowScorer(config, clock=clock)
        self._spool = None
        if config.spool_share:
            self._spool = Spool(
                config.run_dir, config.name, share=config.spool_share, seed=config.seed
            )

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
          ScorerRejected: at the start or expected by a checkpoint, the decided version can no
            longer be loaded as it was.
          StateMismatch: the checkpoint's version is not the ledger's.
          ConfigError: at the start, the scorer is for another kind of windows.
        """
        config = self.config
        n = len(elements)
        k = self.quota(start, n)
        if not config.annotate and k in (0, n):
            count(config.name, blocks=1, windows_seen=n, windows_kept=k)
            kept = np.arange(k)
            self._set_aside(block, elements, None, kept, self._sources(elements))
            return Choice(kept, None, UNDECIDED)
        version, scorer = self._scorer.version(block, expected)
        scores, seconds = self._scorer.scores(scorer, elements)
        kept = select(
            scores,
            n,
            k,
            strength=scorer.strength if scorer is not None else 0.0,
            explore=config.explore,
            seed=config.seed,
            name=config.name,
            block=block,
            groups=[(_groups(cap, config.windows, elements), cap.limit(k)) for cap in config.caps],
        )
        uniform = scores is None
        count(
            config.name,
            blocks=1,
            uniform_blocks=uniform,
            windows_seen=n,
            windows_kept=k,
            uniform_windows=n * uniform,
        )
        sources = self._sources(elements)
        sample = next(iter(elements), None)
        self._scorer.watched.block(
            block, version, scorer, scores, kept, sources, n, seconds, sample
        )
        self._set_aside(block, elements, scores, kept, sources)
        return Choice(kept, scores, version)

    def _sources(self, elements: Sequence[Any]) -> list[str] | None:
        if self.config.source_key is None:
            return None
        return [self._scorer.watched.source(element) for element in elements]

    def _set_aside(
        self,
        block: int,
        elements: Sequence[Any],
        scores: np.ndarray | None,
        kept: np.ndarray,
        sources: list[str] | None,
    ) -> None:
        """Offers the raw block to the spool that calibration reads."""
        if self._spool is not None and elements:
            self._spool.offer_elements(
                block,
                elements,
                self.config.windows,
                keep_probability=len(kept) / len(elements) if scores is None else None,
                kept=kept,
                sources=sources,
            )


def _groups(cap: Cap, windows: Windows, elements: Sequence[Any]) -> np.ndarray:
    """Numbers the groups of a cap: `(n,)` int64."""
    numbers: dict[Any, int] = {}
    labels = np.empty(len(elements), np.int64)
    for position, element in enumerate(elements):
        value = _group(cap, windows, element, position)
        labels[position] = numbers.setdefault(value, len(numbers))
    return labels


def _group(cap: Cap, windows: Windows, element: Any, position: int) -> Any:
    if cap.key is None:
        try:
            content = np.asarray(element if windows.key is None else element[windows.key])
        except (KeyError, TypeError, ValueError):
            return position  # unreadable, so no copy of anything
        return content.shape, content.tobytes()
    if not isinstance(element, Mapping) or cap.key not in element:
        seen = sorted(map(str, element)) if isinstance(element, Mapping) else type(element).__name__
        raise WindowError(
            f"Element {position} has no entry {cap.key!r} for Cap({cap.key!r}), available: {seen}; "
            "put the group's name or number beside the window."
        )
    value = element[cap.key]
    if isinstance(value, (np.ndarray, np.generic)):
        if value.size != 1:
            raise WindowError(
                f"Entry {cap.key!r} of element {position} has shape {value.shape}, expected one "
                "name or number that says which group the window belongs to."
            )
        value = value.item()
    try:
        hash(value)
    except TypeError:
        raise WindowError(
            f"Entry {cap.key!r} of element {position} is a {type(value).__name__}, expected one "
            "name or number that says which group the window belongs to."
        ) from None
    return value


def _check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}, expected an int >= {low}.")

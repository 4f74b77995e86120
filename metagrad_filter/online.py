"""The filter for loaders that hand over one window at a time: no block is read ahead.

    OnlineFilter(config).offer(element) -> Decision(kept, score, version)

The rule is `threshold.py`'s: the keep ratio holds within one percentage point over any 10,000
windows, instead of exactly in every block. Versions change where they would between blocks, at
every `block_windows * swap_every_blocks` windows of this iterator, and come from the same ledger.
State is a few kilobytes of JSON and contains no windows.

Read next: `threshold.py`, `blocks.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metagrad_filter.blocks import FilterConfig, WindowScorer
from metagrad_filter.counting import count
from metagrad_filter.decisions import UNDECIDED
from metagrad_filter.errors import StateMismatch
from metagrad_filter.threshold import Threshold

_FIELDS = {"windows", "version", "threshold"}


@dataclass(frozen=True)
class Decision:
    """What became of one window.

    Attributes:
      kept: whether it is handed on.
      score: float32; NaN where the choice was uniform.
      version: the scorer's version; 0 uniform, -1 when nothing was asked.
    """

    kept: bool
    score: np.float32
    version: int


class OnlineFilter:
    """Decides window by window; belongs to one iterator.

    Args:
      config: with `rule="threshold"`.
      clock: seconds, monotonic; only for `FilterCounters.scoring_seconds`.
    """

    def __init__(self, config: FilterConfig, *, clock=time.monotonic):
        self.config = config
        self._windows = 0
        self._version = UNDECIDED
        self._scorer: Any = None
        # What the statistics of the block under way will be made of.
        self._scores: list[float] = []
        self._kept: list[int] = []
        self._sources: list[str] = []
        self._seen = 0
        self._seconds = 0.0
        self._window_scorer = WindowScorer(config, clock=clock)
        self._rule = Threshold(
            config.keep_ratio, seed=config.seed, name=config.name, explore=config.explore
        )

    def offer(self, element: Any) -> Decision:
        """Decides on the next window.

        Raises:
          WindowError: the element cannot be read as a window, or holds ids out of range.
          ScorerRejected: at the start, the decided version can no longer be loaded as it was.
          ConfigError: at the start, the scorer is for another kind of windows.
        """
        config = self.config
        if config.keep_ratio == 1 and not config.annotate:
            self._windows += 1
            count(config.name, windows_seen=1, windows_kept=1)
            return Decision(True, np.float32(np.nan), UNDECIDED)
        if self._windows % config.block_windows == 0:
            self._begin(UNDECIDED)
        scores, seconds = self._window_scorer.scores(self._scorer, [element])
        kept = self._decide(None if scores is None else float(scores[0]))
        self._windows += 1
        self._seconds += seconds
        self._watch(element, scores, kept)
        count(config.name, windows_seen=1, windows_kept=kept, uniform_windows=self._scorer is None)
        score = np.float32(np.nan) if scores is None else scores[0]
        return Decision(kept, score, self._version)

    def _decide(self, score: float | None) -> bool:
        if self._scorer is None:
            score = 0.0  # strength 0: the rule draws by lot
        kept = self._rule.offer(score)
        return kept or self.config.keep_ratio == 1

    def _watch(self, element: Any, scores: np.ndarray | None, kept: bool) -> None:
        config, watched = self.config, self._window_scorer.watched
        if not config.statistics:
            return
        if kept:
            self._kept.append(self._seen)
        self._seen += 1
        if scores is not None:
            self._scores.append(float(scores[0]))
        if config.source_key is not None:
            self._sources.append(watched.source(element))
        if self._windows % config.block_windows == 0:
            whole = len(self._scores) == self._seen
            watched.block(
                self._windows // config.block_windows - 1,
                self._version,
                self._scorer,
                np.array(self._scores, np.float32) if whole else None,
                np.array(self._kept, np.int64),
                self._sources if config.source_key is not None else None,
                self._seen,
                self._seconds,
            )
            self._forget()

    def _forget(self) -> None:
        self._scores, self._kept, self._sources = [], [], []
        self._seen, self._seconds = 0, 0.0

    def _begin(self, expected: int) -> None:
        block = self._windows // self.config.block_windows
        version, scorer = self._window_scorer.version(block, expected)
        if version != self._version:
            if scorer is None:
                self._rule.begin(None, 0.0)
            else:
                self._rule.begin(_reference(scorer), scorer.strength)
        self._version, self._scorer = version, scorer

    @property
    def threshold(self) -> float:
        """The score that a window must exceed to be kept now; NaN where there is none."""
        return self._rule.score if self._scorer is not None else math.nan

    def state(self) -> dict[str, Any]:
        """Returns the state as JSON types of constant structure."""
        return {
            "windows": self._windows,
            "version": self._version,
            "threshold": self._rule.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
          StateMismatch: it has other fields, or the ledger holds another version.
          ScorerRejected: its version can no longer be loaded as it was.
        """
        if not isinstance(state, Mapping) or set(state) != _FIELDS:
            seen = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise StateMismatch(
                f"The filter's state has fields {seen}, expected {sorted(_FIELDS)}; it was "
                "written by another pipeline, restore it with that one."
            )
        self._forget()
        self._windows = int(state["windows"])
        self._version = int(state["version"])
        self._scorer = None
        if self._version != UNDECIDED and self._windows % self.config.block_windows:
            self._version, self._scorer = self._window_scorer.version(
                self._windows // self.config.block_windows, self._version
            )
        self._rule.restore(state["threshold"], _reference(self._scorer))


def _reference(scorer: Any) -> list[float] | None:
    """Returns the quantiles that a fit stores with its scorer, or None."""
    values = None if scorer is None else scorer.metadata.get("reference")
    usable = (
        isinstance(values, list)
        and len(values) >= 2
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        and values == sorted(values)
    )
    return values if usable else None

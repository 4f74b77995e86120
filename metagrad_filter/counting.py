"""What each filter of this process did so far: plain numbers, for logs, tests and exporters."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from dataclasses import dataclass


@dataclass
class FilterCounters:
    """What one filter did in one process, since the process started.

    Attributes:
      blocks: blocks chosen (`rule="block"`).
      uniform_blocks: of these, blocks kept uniformly because no scorer could act.
      windows_seen: windows offered.
      windows_kept: windows kept.
      uniform_windows: windows offered while no scorer could act.
      scoring_seconds: time inside scorers, in seconds of monotonic clock.
      non_finite_scores: scores that were NaN or inf and therefore ranked last.
      bad_windows: windows that could not be read and ranked last (`bad_windows="last"`).
      versions_skipped: corrupt versions passed over at a decision.
      versions_lost: decisions whose version could no longer be used; that part was kept uniformly.
      scorer_failures: blocks or windows kept uniformly because the scorer raised.
      ledger_unwritable: decisions that could not be recorded.
    """

    blocks: int = 0
    uniform_blocks: int = 0
    windows_seen: int = 0
    windows_kept: int = 0
    uniform_windows: int = 0
    scoring_seconds: float = 0.0
    non_finite_scores: int = 0
    bad_windows: int = 0
    versions_skipped: int = 0
    versions_lost: int = 0
    scorer_failures: int = 0
    ledger_unwritable: int = 0


_counters: dict[str, FilterCounters] = {}
_warned: set[tuple[str, str]] = set()
# Reentrant: finalizers count too, and may run in a thread that is counting.
_lock = threading.RLock()


def counters(name: str = "default") -> FilterCounters:
    """Returns a snapshot of this process's counters for the filter `name`."""
    with _lock:
        return dataclasses.replace(_counters.get(name, FilterCounters()))


def count(name: str, **increments: float) -> None:
    """Adds to counters of the filter `name`."""
    with _lock:
        mine = _counters.setdefault(name, FilterCounters())
        for field, increment in increments.items():
            setattr(mine, field, getattr(mine, field) + increment)


def warn_once(name: str, about: str, message: str) -> None:
    """Warns about something once per filter and process; counters say how often it happened."""
    with _lock:
        if (name, about) in _warned:
            return
        _warned.add((name, about))
    warnings.warn(message, RuntimeWarning, stacklevel=3)

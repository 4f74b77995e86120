"""Retreats to uniform selection when live validation broke its trend, and asks for a round.

    Retreat(run_dir, registry).look() -> ["version 8 selects uniformly: the validation loss at ..."]

`validation.py` says what a break is; this looks whenever the training job has recorded another
loss, answers each break once, and remembers that in `run_dir/monitor/validation.json`. A break in a
time of uniform selection is nobody's fault and is put aside, or the next version would be blamed
for it. A process that is killed between its steps takes them up again.

Cost: one `stat` a look, and what `validation.broken_trend` costs where there is a new loss.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from metagrad_filter.calibration.attend import FOLDER
from metagrad_filter.calibration.requests import request_round
from metagrad_filter.calibration.validation import (
    FILE,
    broken_trend,
    fall_back,
    last_fallback,
    read_validation,
)
from metagrad_filter.errors import ScorerRejected
from metagrad_filter.files import canonical_json, read_bounded, replace_file
from metagrad_filter.registry import Registry

STATE = "validation.json"

_LIMIT = 65536


class Retreat:
    """Watches the validation losses of a run.

    Args:
      run_dir: the run directory.
      registry: its versions.

    Attributes:
      count: how often this object fell back.
    """

    def __init__(self, run_dir: str | Path, registry: Registry):
        self._run_dir, self._registry = Path(run_dir), registry
        self._path = self._run_dir / FOLDER / STATE
        self._seen: tuple[int, int] | None = None
        self._state = self._read()
        self.count = 0

    def look(self) -> list[str]:
        """Falls back where a break is new; returns a line for each thing done.

        Raises:
          OSError, PublishFailed, DataError: what is needed cannot be read or written.
        """
        said = self._ask()
        try:
            status = os.stat(self._run_dir / FILE)
        except FileNotFoundError:
            return said
        seen = status.st_size, status.st_mtime_ns
        if seen == self._seen:
            return said
        steps, losses = read_validation(self._run_dir)
        after = max(last_fallback(self._registry), self._state["aside"])
        found = broken_trend(steps, losses, after=after) if len(steps) else None
        if found is not None:
            version = fall_back(self._registry, found)
            if version is None:
                self._keep(aside=found.step)
                said.append(f"selection is uniform already: {found}")
            else:
                self.count += 1
                said += [f"version {version} selects uniformly: {found}", *self._ask()]
        self._seen = seen
        return said

    def _ask(self) -> list[str]:
        """Asks for the round that may lift the fallback that is in force, once."""
        newest = self._registry.latest()
        if newest is None or newest == self._state["looked"]:
            return []
        try:
            reason = self._registry.manifest(newest)["metadata"].get("fallback")
        except ScorerRejected:
            reason = None  # the filter refuses it too and says so
        if reason is not None:
            told = f"fell back to uniform: {reason}"
            request_round(self._run_dir, told, key=f"fallback-{newest}", version=newest)
        self._keep(looked=newest)
        return [] if reason is None else [f"asked for a round: {told}"]

    def _keep(self, **changes: int) -> None:
        state = self._state | changes
        replace_file(self._path, canonical_json(state))
        self._state = state

    def _read(self) -> dict[str, Any]:
        """What was answered; damaged is as good as none, for versions tell of fallbacks."""
        state = {"aside": -1, "looked": 0}
        try:
            found = json.loads(read_bounded(self._path, _LIMIT))
            return {name: int(found[name]) for name in state}
        except (OSError, ValueError, KeyError, TypeError):
            return state

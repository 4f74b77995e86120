"""Which scorer version ranks which interval of blocks: a write-once record.

    run_dir/ledger/<name>/%08d.json = {"interval", "version", "manifest_sha256"}

The first process that reaches an interval decides it, by creating a file that did not exist; every
other process, every later epoch and every resumed run reads the same answer. This is what makes a
stream reproducible while scorers are published beside it. Version 0 means that no scorer was
there: a seeded uniform k of M. `filter.json` beside the entries records the filter's configuration
once, so that another configuration cannot silently replay decisions that were not made for it.

Read next: `blocks.py` (who asks), `registry.py` (what a version is).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagrad_filter.errors import ConfigError, StateMismatch
from metagrad_filter.files import canonical_json, read_bounded, write_once

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_ENTRY = re.compile(r"(\d{8,})\.json")
_MAX_ENTRY_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Entry:
    """One decision.

    Attributes:
      interval: index of the interval of blocks, from 0.
      version: scorer version; 0 for the uniform choice.
      manifest_sha256: hash of the version's manifest; "" for version 0.
    """

    interval: int
    version: int
    manifest_sha256: str


class Ledger:
    """The decisions of one filter.

    Args:
      run_dir: the run's directory.
      name: one filter of the run, `[a-z0-9][a-z0-9_-]{0,63}`.
    """

    def __init__(self, run_dir: str | os.PathLike[str], name: str = "default"):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"name is {name!r}, expected 1 to 64 characters a-z, 0-9, '_' or '-', "
                "starting with a letter or digit."
            )
        self.name = name
        self.run_dir = Path(run_dir)
        self.directory = self.run_dir / "ledger" / name

    def decide(self, interval: int, version: int, manifest_sha256: str = "") -> int:
        """Records a version for an interval unless one is recorded.

        Args:
          interval: from 0.
          version: the proposed version; 0 for the uniform choice.
          manifest_sha256: hash of the proposed version's manifest.

        Returns:
          The recorded version, which is another process's if that came first. Raises `OSError`
          when the directory cannot be written and `StateMismatch` when the record is damaged.
        """
        entry = Entry(interval, version, manifest_sha256)
        _check_entry(entry, interval, "the proposed decision")
        self.directory.mkdir(parents=True, exist_ok=True)
        if write_once(self._path(interval), canonical_json(vars(entry))):
            return version
        winner = self.read(interval)
        if winner is None:
            raise StateMismatch(
                f"{self._path(interval)} vanished while it was read; decisions are never "
                "deleted. Restore the ledger, or use another name."
            )
        return winner.version

    def read(self, interval: int) -> Entry | None:
        """Returns the decision for an interval, or None; raises `StateMismatch` if damaged."""
        data = self._read(self._path(interval))
        return None if data is None else self._parse(data, interval)

    def entries(self) -> dict[int, Entry]:
        """Returns all decisions by interval, in order."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return {}
        found = sorted(int(match[1]) for name in names if (match := _ENTRY.fullmatch(name)))
        return {n: entry for n in found if (entry := self.read(n)) is not None}

    def fork(self, new_name: str, up_to: int | None = None) -> Ledger:
        """Copies decisions under another name, for a run that should differ from some point on.

        Args:
          new_name: the other name; decisions it already holds must agree.
          up_to: the last interval copied; None copies all.

        Returns:
          The ledger of the new name. Raises `StateMismatch` if it holds another decision.
        """
        other = Ledger(self.run_dir, new_name)
        for interval, entry in self.entries().items():
            if up_to is not None and interval > up_to:
                break
            winner = other.decide(interval, entry.version, entry.manifest_sha256)
            if winner != entry.version:
                raise StateMismatch(
                    f"Ledger {new_name!r} already holds version {winner} for interval {interval}, "
                    f"ledger {self.name!r} has version {entry.version}; fork to an unused name."
                )
        return other

    def bind(self, config: dict[str, Any]) -> None:
        """Records the filter's configuration, or checks it against the recorded one.

        Args:
          config: JSON types only.

        Raises:
          StateMismatch: another configuration is recorded; names the first field that differs.
          OSError: the directory cannot be written.
        """
        path = self.directory / "filter.json"
        data = self._read(path)
        if data is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            if write_once(path, canonical_json(config)):
                return
            data = self._read(path)
        try:
            recorded = json.loads(data or b"")
        except (ValueError, RecursionError):
            recorded = None
        if not isinstance(recorded, dict):
            raise StateMismatch(
                f"{path} is damaged; restore it, or use another name for this filter."
            )
        for field in sorted(recorded.keys() | config.keys()):
            if recorded.get(field) != config.get(field):
                raise StateMismatch(
                    f"The filter {self.name!r} of {self.run_dir} was started with "
                    f"{field}={recorded.get(field)!r} and now has {config.get(field)!r}, so its "
                    "decisions do not apply. Use the recorded value, or give this filter another "
                    "name= (Ledger.fork copies the decisions)."
                )

    def _path(self, interval: int) -> Path:
        return self.directory / f"{interval:08d}.json"

    def _read(self, path: Path) -> bytes | None:
        try:
            return read_bounded(path, _MAX_ENTRY_BYTES)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StateMismatch(
                f"{path} is damaged ({error}); restore it, or use another name for this filter."
            ) from None

    def _parse(self, data: bytes, interval: int) -> Entry:
        try:
            value = json.loads(data)
            if canonical_json(value) != data:
                raise ValueError("not in canonical form")
            entry = Entry(**value)
            _check_entry(entry, interval, "the entry")
        except (TypeError, ValueError, RecursionError) as error:
            raise StateMismatch(
                f"{self._path(interval)} is damaged ({error}), so the stream cannot be replayed; "
                "restore the file, or use another name for this filter."
            ) from None
        return entry


def _check_entry(entry: Entry, interval: int, what: str) -> None:
    for field, low in (("interval", 0), ("version", 0)):
        value = getattr(entry, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{field} of {what} is {value!r}, expected an int >= {low}.")
    if entry.interval != interval:
        raise ConfigError(f"interval of {what} is {entry.interval}, expected {interval}.")
    if not isinstance(entry.manifest_sha256, str):
        raise ConfigError(f"manifest_sha256 of {what} is not a string.")
